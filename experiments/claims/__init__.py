"""The tutorial notebook's claims about DPO, RLHF and their variants, measured."""
