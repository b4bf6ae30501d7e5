"""How fast language models are tuned: beside the machine's peak, and beside PyTorch and TRL."""
