"""An interpreter of PTX in NumPy: runs the text that is shipped, without a GPU, and faults where hardware would err.

Example:
    program = Program(text)
    report = program.run("kernel", [x, y, 64], grid=(4, 1, 1), block=(128, 1, 1), shared=4096)
"""

from .program import Program
from .report import Fault, Report

__all__ = ["Fault", "Program", "Report"]
