"""From files to checked examples: tables, audio and pictures are read, bad rows told, some held out for evaluation."""
