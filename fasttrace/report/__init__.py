"""Results in numbers, tables and one HTML page. Knows rows and pictures, no engine."""
