"""Why performance changed, and whether traffic drifted: pure statistics, and what feeds them from the store."""
