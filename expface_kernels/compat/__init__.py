"""Bridges from and to the heads of other libraries; none of them is imported before it is used."""
