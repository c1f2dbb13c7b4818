"""Makes pages, spreadsheets and logs from results."""
