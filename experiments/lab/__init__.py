"""What experiments share: the standard pipeline, methods, tuning; options, files, tables."""
