"""A study: its file, its search space, its plan, what it draws, ranks and prunes."""
