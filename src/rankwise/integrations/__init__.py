"""Support for trainers of other libraries. Users call only what the documentation of their trainer names."""
