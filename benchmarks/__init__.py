"""What `ft` is measured against, and the made-up weights it is measured with."""
