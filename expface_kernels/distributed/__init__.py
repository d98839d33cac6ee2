"""Class centers spread over the ranks of a process group: who holds what, and what ranks send each other."""
