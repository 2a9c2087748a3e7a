"""`python -m phinetune`"""

from phinetune.cli import main

main()
