"""Pages, spreadsheets and logs that are made of results."""
