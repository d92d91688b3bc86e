"""The full-screen app. It imports core, and never torch, transformers or datasets."""
