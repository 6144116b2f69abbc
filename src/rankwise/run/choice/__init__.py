"""How ranks are chosen."""
