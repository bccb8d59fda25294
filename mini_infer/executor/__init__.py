"""What turns a step into tokens. Importing this does not import torch; ``executor.build`` does, and makes the real one."""
