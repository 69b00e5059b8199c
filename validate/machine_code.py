"""What can be said of a kernel by its machine code (nvdisasm) alone."""

import re

# Instructions whose first operand, where it is a uniform register, is read: nothing is written, or
# a predicate is.
NO_RESULT = ("BAR", "BRA", "BRX", "EXIT", "PLOP3", "RED", "ST", "SYNCS", "UISETP", "UTMA")


def _lines(sass):
    """Instructions without comments, and {label: number of the instruction behind it}."""
    code, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif text := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*)", line):
            code.append(re.sub(r"/\*.*?\*/", "", text[1]).strip())
    return code, labels


def read_before_written(sass):
    """Uniform registers that are read although a path leads there that has not written them.

    ptxas of CUDA 12.8, which Triton 3.6 ships, has been seen to compute the address of a matrix
    product's operand in front of one loop and to use it in the next loop, also where the first one
    does not run at all: no warning, wrong results. Returns pairs of a line of code and the numbers
    of such registers. A write under a predicate counts as one.
    """
    code, labels = _lines(sass)
    follows, reads, writes = [], [], []
    for i, line in enumerate(code):
        guard, op, rest = re.match(r"(@!?U?P\w+\s+)?([\w.]+)\s*([^;]*)", line).groups()
        targets = [labels[x] for x in re.findall(r"\.L_x_\d+", line)]
        goes_on = guard or re.search(r"\bU?P\d", rest) or not op.startswith(("EXIT", "BRX", "BRA"))
        follows.append(targets + [i + 1] * (bool(goes_on) and i + 1 < len(code)))
        read, written = set(), set()
        operands = [x.strip() for x in rest.split(",")]
        for n, x in enumerate(operands):
            for r in map(int, re.findall(r"\bUR(\d+)\b", x)):
                if "gdesc" in x:  # of both operands in shared memory, or of B, A being in registers
                    read |= {r + 2, r + 3} | (set() if operands[1][:1] == "R" else {r, r + 1})
                elif x == f"UR{r}" and (n == 0 or (n == 1 and op.startswith(("VOTEU", "R2UR")))):
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
        (line, sorted(missing))
        for line, read, before in zip(code, reads, known, strict=True)
        if before is not None and (missing := read - before)
    ]


def product_loops(sass):
    """The innermost loops in which wgmma is issued, each a list of its lines of code."""
    code, labels = _lines(sass)
    loops = [
        (labels[target], end)
        for end, op in enumerate(code)
        if re.match(r"@\S+ BRA", op)  # without a condition: the way back from a wait
        for target in re.findall(r"\.L_x_\d+", op)
        if labels.get(target, end + 1) <= end
    ]
    loops = [(start, end) for start, end in loops if "HGMMA" in " ".join(code[start:end])]
    return [  # what an inner loop leaves is often taken after it
        code[start:end]
        for start, end in loops
        if not any((start, end) != (s, e) and start <= s and e <= end for s, e in loops)
    ]


def lost_operands(sass):
    """Registers that a loop computes for one of its products, while another has them from before.

    ptxas 12.8 and 12.9 can give a left operand of wgmma that stays the same through a loop the
    registers of one that each turn computes: from the second turn on, the first product takes the
    second one's operand (seen on an H200 as a wrong dQ). In order of a loop's code: a product takes
    a register, something writes it, another product takes it, and the next turn begins.
    """
    lost = set()
    for loop in product_loops(sass):
        taken, written = {}, {}
        for i, line in enumerate(loop):
            if wgmma := re.match(r"(?:@\S+ )?HGMMA\S* R\d+, R(\d+),", line):
                for r in range(int(wgmma[1]), int(wgmma[1]) + 4):
                    taken.setdefault(r, []).append(i)
            elif gives := re.match(r"(?:@\S+ )?(?!ST|BAR|SYNCS|RED|HGMMA)\S+ R(\d+)\b", line):
                written.setdefault(int(gives[1]), []).append(i)
        for r in taken.keys() & written.keys():
            if taken[r][0] < written[r][0] and written[r][-1] < taken[r][-1]:
                lost.add(r)
    return sorted(lost)
