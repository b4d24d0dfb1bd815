"""Every query of the project. Functions take a session first and return records, never rows that stay attached."""
