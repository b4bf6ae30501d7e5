"""What several experiments share: their pipeline, methods and tuning, and what a command needs around it."""
