"""Your own comparisons: which responses people prefer, and how sure that is."""
