"""What papers say about responses of several tokens, measured where the truth is known."""
