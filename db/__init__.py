"""PostgreSQL, and nothing about jobs."""
