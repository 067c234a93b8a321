"""Fine-tuning from Python: `ft.fine_tune` for rows in memory, and the `Run` that it returns."""
