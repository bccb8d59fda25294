"""What code written against other engines relies on, and the core would not have chosen: other names, other shapes.

The core takes a table or a small class from here at its doors, and knows nothing more of it.
"""
