"""`optimize` and what it is made of: capture -> prepare -> plan -> lower -> validate -> write."""
