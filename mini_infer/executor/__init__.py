"""What turns a step into tokens. Importing this alone does not import torch; ``executor.build`` makes the real one."""
