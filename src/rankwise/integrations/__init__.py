"""What other libraries' trainers need in order to work with an adapted model; nothing that a user calls."""
