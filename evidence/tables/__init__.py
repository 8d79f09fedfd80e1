"""What docs/results.md reports: each module measures one table, or a family of tables, on the demo model."""
