"""torchrun, with the exit code of the first rank that failed in place of 1: a wrong setting is not tried again and again."""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        print(error, file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)  # as a shell counts signals
    except SignalException as error:  # torchrun has passed it on, and the ranks have ended
        sys.exit(128 + error.sigval)
