"""What runs a plan. The reference engine is the obviously right, slow form."""
