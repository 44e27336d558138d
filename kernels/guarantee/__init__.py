"""Bounds the attention mass that a selection of method ``sketch`` leaves unread, from a sample of the unread tokens."""
