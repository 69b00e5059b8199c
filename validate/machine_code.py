"""What can be said of a kernel by its machine code (nvdisasm) alone."""

import re

# Instructions whose first operand, where it is a uniform register, is read: nothing is written, or
# a predicate is.
NO_RESULT = ("BAR", "BRA", "BRX", "EXIT", "PLOP3", "RED", "ST", "SYNCS", "UISETP", "UTMA")


def read_before_written(sass):
    """Uniform registers that are read although a path leads there that has not written them.

    ptxas of CUDA 12.8, which Triton 3.6 ships, has been seen to compute the address of a matrix
    product's operand in front of one loop and to use it in the next loop, also where the first one
    does not run at all: no warning, wrong results. Returns pairs of a line of code and the numbers
    of such registers. A write under a predicate counts as one.
    """
    code, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif text := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*)", line):
            code.append(text[1])

    follows, reads, writes = [], [], []
    for i, line in enumerate(code):
        text = re.sub(r"/\*.*?\*/", "", line)
        guard, op, rest = re.match(r"(@!?U?P\w+\s+)?([\w.]+)\s*([^;]*)", text).groups()
        targets = [labels[x] for x in re.findall(r"\.L_x_\d+", line)]
        goes_on = guard or re.search(r"\bU?P\d", rest) or not op.startswith(("EXIT", "BRX", "BRA"))
        follows.append(targets + [i + 1] * (bool(goes_on) and i + 1 < len(code)))
        read, written = set(), set()
        operands = [x.strip() for x in rest.split(",")]
        for n, x in enumerate(operands):
            for r in map(int, re.findall(r"\bUR(\d+)\b", x)):
                if "gdesc" in x:  # of both operands in shared memory, or of B, A being in registers
                    read |= {r + 2, r + 3} | (set() if operands[1][:1] == "R" else {r, r + 1})
                elif x == f"UR{r}" and (n == 0 or (n == 1 and op.startswith("VOTEU"))):
                    wide = 2 if "64" in op or "WIDE" in op else 1
                    (read if op.startswith(NO_RESULT) else written).update(range(r, r + wide))
                else:
                    read.add(r)
        reads.append(read)
        writes.append(written)

    known = [None] * len(code)  # what all paths to a line have written
    known[0], work = frozenset(), [0]
    while work:
        i = work.pop()
        after = known[i] | writes[i]
        for j in follows[i]:
            new = after if known[j] is None else known[j] & after
            if new != known[j]:
                known[j] = new
                work.append(j)
    return [
        (line.strip(), sorted(missing))
        for line, read, before in zip(code, reads, known, strict=True)
        if before is not None and (missing := read - before)
    ]
