"""The built-in demo checkpoints (`builtin:llama` and so on) and the scripts that made them."""
