"""Measurements of docs/results.md: each module measures one table or family of tables on the demo model."""
