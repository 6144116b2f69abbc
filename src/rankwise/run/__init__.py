"""One optimizer step after another, and what is remembered of them."""
