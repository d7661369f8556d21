"""What a trace asks for: sites, windows, lanes, the rows they become and the rows' keys."""
