"""Class centres spread over the ranks of a process group, and losses over a sample of them."""
