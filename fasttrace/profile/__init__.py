"""Where a trace's time goes: the compiled graphs with a clock between their operators."""
