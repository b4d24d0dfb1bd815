"""Every query of the project. Functions take a session as their first argument and return records, never rows that stay attached."""
