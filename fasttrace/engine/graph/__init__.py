"""The small compiler: trace a denoiser, split it by what it depends on, insert patches."""
