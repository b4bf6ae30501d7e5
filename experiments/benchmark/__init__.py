"""How fast whole experiments, training runs and losses are, beside what the machine can do."""
