r"""Where a text states its answer: `\boxed{}`, `#### N`, `<answer>`, "answer is"; without any of them, at its end.

Regular expressions see only the last `MAX_TEXT_CHARS` characters of a text, and each repetition in them is bounded.
Left out, because each has turned failures into successes elsewhere: credit for format or for showing work, and
numbers from the middle of a reply.
"""

import re

from bcft.rewards.plain import NUMBER, SCALES, TEXT, UNSIGNED, Quantity, plain, same, strip, with_signs
from bcft.rewards.sandbox import MAX_TEXT_CHARS

# What of a text is its reply.
_THOUGHT_ENDS = ("</think>", "</thinking>", "</thought>", "</reasoning>", "<|channel|>final<|message|>")
_THOUGHT_STARTS = ("<think>", "<thinking>", "<thought>", "<reasoning>", "<|channel|>analysis")
_STOP_TOKEN = (
    r"(?:</s>|<eos>|<end_of_turn>|<turn\|>|<\|(?:im_end|endoftext|eot_id|eom_id|end_of_text|end|return|eot|user)\|>"
    r"|<｜[^｜>\n]{1,40}｜>)"
)
_TURN_END = re.compile(_STOP_TOKEN)
_TURN_START = re.compile(rf"(?:\s|{_STOP_TOKEN}|<s>|<bos>|<\|(?:im_start|start|assistant|begin_of_text)\|>)+")
_CALCULATION = re.compile(r"<<[^<>\n]{0,100}>>")
"""GSM8K's annotation of a calculation: 9 + 9 = <<9+9=18>>18."""
_MARKUP = re.compile(r"</?(?:b|i|u|p|br|em|code|span|strong)\s?/?>", re.IGNORECASE)


def visible(text: str) -> str:
    """Return what a reader of the reply sees: the part behind its last thought, up to the first stop token.

    A thought that is never closed leaves nothing. At most `MAX_TEXT_CHARS` characters, the last ones.
    """
    if "<" not in text:
        return with_signs(text[-MAX_TEXT_CHARS:])
    closed = max((text.rfind(tag) + len(tag) for tag in _THOUGHT_ENDS if tag in text), default=0)
    if any(text.find(tag, closed) >= 0 for tag in _THOUGHT_STARTS):
        return ""
    text = text[closed:]
    start = _TURN_START.match(text)
    text = text[start.end() if start else 0 :]
    end = _TURN_END.search(text)
    text = text[: end.start() if end else len(text)]
    return with_signs(_MARKUP.sub(" ", text[-MAX_TEXT_CHARS:]))


_TAG = re.compile(r"</?[A-Za-z_]{1,20}>")

# The place of the answer in it.
_MARK = re.compile(
    r"""
    (?P<box> \\ (?: boxed | fbox ) \s* \{ )
    | (?P<hashes> (?<!\#) \#{4} (?!\#) )
    | < (?P<tag> answer | final_answer ) >
    | \b answers? \b [^.:=\n<>]{0,40}? (?: \b (?: is | are | be ) \b | [:=] )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_HEDGE = r"(?: (?: about | approximately | equal\s+to | exactly | now | simply | therefore | thus ) \b"
_LEAD = re.compile(rf"""(?: [\s*_:=`"~] | \\" )* {_HEDGE} [\s*_:=`"]* )?""", re.VERBOSE | re.IGNORECASE)
_PHRASE = re.compile(
    rf"""
    (?: [\s*_:=`"$~] | \\[\[($] )* {_HEDGE} [\s*_:=`"$]* )?
    (?P<answer> .*? )
    (?: (?<![-+−\\])\$ | (?<!\\)\\[\])] | \*\*(?![\w(]) | [`"\n] | [.!?](?=\s|$) | ;(?![0-9\s-]) | </
      | , \s+ (?!and\b|or\b)(?=[a-z]{{2}}) | \s+ \( (?=[a-z]{{2}})
      | \s+ (?: after | as | because | if | since | so | when | where | which ) \b | $ )
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""The text after "answer is", up to the end of its clause."""
_LONGEST_PHRASE = 300
_SEGMENT = re.compile(
    r"""
    \$\$ (?P<display> [^$]{1,400} ) \$\$ | (?<!\\) \\\[ (?P<bracket> .{1,400}? ) (?<!\\) \\\]
    | (?<!\\) \\\( (?P<round> .{1,400}? ) (?<!\\) \\\) | (?<![\\$]) \$ (?P<inline> [^$]{1,400} ) (?<!\\) \$ (?![0-9])
    """,
    re.VERBOSE | re.DOTALL,
)
_PERCENT_BEHIND = re.compile(r"\s?\$?\s?(?:\\?%|percent\b|per cent\b|pct\b)", re.IGNORECASE)
_EMPTY_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{\s*\}")
_JOINT = re.compile(
    r"""
    (?: \\quad | \\qquad | \\[,;\ )(\[\]] | [\s$.*] )*
    (?: , | ; )?
    (?: \\quad | \\qquad | \\[,;\ )(\[\]] | [ $*] )*
    (?: \\text\s*\{ [^{}]{0,40}? \b (?: and | or ) \s* \} | (?: [a-z]{1,12} \s+ )? (?: and | or ) \s )?
    (?: \\quad | \\qquad | \\[,;\ )(\[\]] | [\s$*] )*
    (?: [a-z] (?: _ \{? \w \}? )? \s* = \s* )?
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""What may stand between the parts of one answer: `\\boxed{1}` and `\\boxed{2}`."""
_LONGEST_JOINT = 80
_ENVIRONMENT = re.compile(r"\\begin\{(\w{1,12})\}.{0,600}?\\end\{\1\}", re.DOTALL)
_FORMULA = re.compile(
    r"""
    (?: [-+−–.±] | [<>≤≥≠]=? | != )? \s* [0-9$\\(\[{|√π∞±]
    | [A-Za-z] (?![A-Za-z]) (?!\s+[A-Za-z])
    | (?: [A-Za-z][ ] )? [A-Za-z]{1,3} (?: [\^_(+*/=<>-] | [ ][+=<>] )
    | (?! (?: an|as|at|be|by|do|he|if|in|is|it|me|my|no|of|ok|on|or|so|to|up|us|we ) $ ) [A-Za-z]{2} $
    """,
    re.VERBOSE,
)
"""How a formula begins."""
_FUNCTIONS = "arc(?:sin|cos|tan)|sin|cos|tan|cot|sec|csc|log|exp|sqrt|max|min|mod|gcd|lcm|floor|ceil|and|for|all"
_PROSE = re.compile(
    rf"""
    (?<![A-Za-z\\0-9^_{{(+*/=-]) (?! (?:{_FUNCTIONS}) \b )
    (?: (?= [A-Z]* [a-z] ) [A-Za-z]{{4,}} | (?<![+*/=<>-][ ]) (?= [A-Z]* [a-z] ) [A-Za-z]{{3}} (?! [ ]?[+*/=<>-] ) )
    (?! [A-Za-z0-9^_+*/=({{)}}-] )
    """,
    re.VERBOSE,
)
"""A word that touches no operator; one of three letters does not stand beside one either."""
_EQUATIONS = re.compile(r"=[^=]{1,100}\b(?:and|or)\b[^=]{1,100}=")
_EQUALS = re.compile(r"(?<![<>!:=\\])=(?!=)")
_NAME = re.compile(r"\s*(?:\\[A-Za-z]+|[A-Za-z])\s*(?:_\s*(?:\{[^{}]*\}|\w)|\([^()]{0,20}\)|')?\s*")
_NOT = r"""
    \b (?: not | never | cannot | nor | [a-z]{1,8}n['’]t )
    (?: \s+ (?: be | equal | to | possibly | really | actually | just | only | simply | exactly | likely ) ){0,3} \s*
    """
_RELATION = r"""
    (?: [<>]=? | [≤≥≠] | !=
      | \\ (?: not\s*(?: [=<>] | \\[a-z]{1,9} )
           | (?: n?[gl]e(?:qq?|qslant)? | neq? | [gl]t | gg | ll | gtrsim | lesssim ) (?![a-z]) ) )
    """
_BOUND = r"""
    (?: ^ | [\n.:,;>(*#] | \b (?: is | are | be | was | were | lies | equals? | answer ) \b ) \s*
    (?: (?: strictly | definitely | certainly | clearly | probably | somewhere | somewhat | something | anything
          | anywhere | (?:a|some|any) \s+ number ) \s+ ){0,2}
    (?: at \s+ (?:the\s+)? (?:least | most) | over | under | above | below | up \s+ to | anything \s+ but
      | (?: (?:no|not|any) \s+ )? (?: more | less | fewer | greater | larger | smaller | bigger | higher | lower )
        \s+ than (?: \s+ or \s+ equal \s+ to )?
      | between \s+ \S{1,20} \s+ (?:\S{1,12} \s+)? and | from \s+ \S{1,20} \s+ to ) \s*
    """
_DENIED = re.compile(
    rf"(?: {_NOT} | {_BOUND} | (?: ^ | [\s$(*:] ) {_RELATION} \s* ) [:*$]{{0,3}} \s* $", re.VERBOSE | re.IGNORECASE
)
"""What makes of the number behind it no answer: "not 7" and, unless a verb like "needs" is before it, "at least 7"."""
_OPEN_ENDED = re.compile(
    r"\s{0,5}(?:\\text\{)?\s{0,5}or\s+(?:more|less|fewer|greater|higher|lower|above|below|over|under)\b"
)
_DENIED_IN_MARK = re.compile(rf"{_NOT} (?: is | are | be )? \s* [:=]? $", re.VERBOSE | re.IGNORECASE)
_ALTERNATIVE = re.compile(
    r"(?<!\S)(?<![-+*/=×÷]\s)(?P<other>\S{1,30}?),?\s+or\s+(?:(?:maybe|perhaps|possibly|even|is\s+it)\s+)?[$*]{0,3}$",
    re.IGNORECASE,
)
_LEADING_RELATION = re.compile(rf"\s*{_RELATION}", re.VERBOSE)
_RELATION_OF_NAME = re.compile(rf"\A\s*[A-Za-z]\s*(?={_RELATION})", re.VERBOSE)
_TOKEN = re.compile(
    rf"""
    (?<![\w.,\\{{^/*+−–-]) (?<![0-9]:)
    [-+−–]? [$€£¥]? [-+−–]?
    (?: (?: [0-9]+ \s* )? \\[cdt]?frac \s* \{{ [^{{}}\n]{{1,50}} \}} \s* \{{ [^{{}}\n]{{1,50}} \}}
      | (?: [0-9]+ [ ] )? {UNSIGNED} / {UNSIGNED}
      | {UNSIGNED} )
    (?: \s* \\?% | \s+ (?: per[ ]?cent | percentage | pct | {"|".join(SCALES)} ) \b )?
    (?! [\w^\\{{}}*] | / [^A-Za-z] | [.,] [0-9] )
    """,
    re.VERBOSE,
)


def stated(text: str, *, words: bool, percents: bool = False) -> str | None:
    """Return the last answer that is marked as one; '' when it is truncated, None when there is no mark.

    Boxes with nothing but "and", "or" and signs between them are parts of one answer. Plain words after "answer is" or
    `####` count only with `words`: "the answer is correct" and "#### Step" do not. With `percents` a percent sign
    behind a box is part of its answer; else it is not read, like any unit there.
    """
    marks = list(_MARK.finditer(text))
    for number in range(len(marks) - 1, -1, -1):
        mark = marks[number]
        if _DENIED_IN_MARK.search(mark[0]):
            continue
        if mark["box"]:
            answer = _boxes(text, [other for other in marks[: number + 1] if other["box"]], percents=percents)
            if answer is None:
                return ""
        elif mark["tag"]:
            end = text.find("</", mark.end())
            if end < 0:
                return ""
            content = text[mark.end() : end]
            answer = _readable(content, words=True) or unmarked(content)
        elif mark["hashes"]:
            line = text[mark.end() : mark.end() + _LONGEST_PHRASE].lstrip(" \t").partition("\n")[0].partition("</")[0]
            answer = _readable(line, words)
        else:
            answer = _after_answer_is(text[mark.end() : mark.end() + _LONGEST_PHRASE], words)
        if answer:
            return answer
    return None


def unmarked(text: str) -> str:
    """Return the answer of a text that marks none: the text if it is a formula, else its last formula or number."""
    if isinstance(plain(text), Quantity):
        return strip(text)
    text = _ENVIRONMENT.sub(_on_one_line, _TAG.sub("\n", _CALCULATION.sub("", _EMPTY_BOX.sub(" ", text))))
    whole = strip(text)
    if len(whole) <= _LONGEST_PHRASE and "\n" not in whole and _FORMULA.match(whole) and not is_prose(whole):
        return _readable(whole, words=False) or whole
    last, start, end = "", 0, 0
    for segment in _SEGMENT.finditer(text):
        content = _content(segment)
        if not is_prose(content):
            percent = _PERCENT_BEHIND.match(text, segment.end())
            content += r"\%" if percent else ""
            joined = last and _JOINT_OF_SEGMENTS.fullmatch(text, end, segment.start())
            last, start = (f"{last}, {content}", start) if joined else (content, segment.start())
            end = percent.end() if percent else segment.end()
    behind = text[end:]
    if last and not any(digit in behind for digit in "0123456789"):
        return "" if _is_denied(text, start) else _readable(last, words=True) or strip(last)
    return _last_number(text)


def is_prose(text: str) -> bool:
    """Whether a text holds words that no formula and no unit has."""
    if plain(text) is not None:
        return False
    return _PROSE.search(TEXT.sub("", text)) is not None


def _boxes(text: str, boxes: list[re.Match[str]], *, percents: bool) -> str | None:
    """Return what the last box holds, with the boxes that are joined to it; None if the last is not closed."""
    last = _closing_brace(text, boxes[-1].end())
    if last is None:
        return None
    parts, start = [strip(text[boxes[-1].end() : last])], boxes[-1].start()
    if percents and _PERCENT_BEHIND.match(text, last + 1):
        parts[0] += r"\%"
    for box in boxes[-2:-22:-1]:
        end = _closing_brace(text, box.end())
        if end is None or not end < start < end + _LONGEST_JOINT or not _JOINT.fullmatch(text, end + 1, start):
            break
        if "\n" in text[end:start] and not text[end + 1 : start].strip(" $\n.*"):
            break  # on a line of its own the later one replaces the earlier
        parts.append(strip(text[box.end() : end]))
        start = box.start()
    return ", ".join(dict.fromkeys(part for part in reversed(parts) if part))


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return start + brace.start()
    return None


def _after_answer_is(text: str, words: bool) -> str:
    text = _ENVIRONMENT.sub(_on_one_line, text)
    if NUMBER.match(text.lstrip()):
        text = _CALCULATION.sub("", text)
    lead = _LEAD.match(text)
    start = lead.end() if lead else 0
    segment = _SEGMENT.match(text, start)
    parts: list[str] = []
    while segment and not is_prose(content := _content(segment)):
        percent = _PERCENT_BEHIND.match(text, segment.end())
        parts.append(content + (r"\%" if percent else ""))
        joint = _JOINT_OF_SEGMENTS.match(text, segment.end())
        segment = _SEGMENT.match(text, joint.end()) if joint else None
    if parts:
        return _readable(", ".join(dict.fromkeys(map(strip, parts))), words=True)
    phrase = _PHRASE.match(text)
    answer = strip(phrase["answer"]) if phrase else ""
    # A phrase that begins with a number was meant as one: a number from elsewhere must not replace it.
    return _readable(answer, words) or (answer if NUMBER.match(answer) else "")


_JOINT_OF_SEGMENTS = re.compile(r"\s*(?:,\s*(?:(?:and|or)\s+)?|(?:[a-z]{1,12}\s+)?(?:and|or)\s+)", re.IGNORECASE)


def _on_one_line(match: re.Match[str]) -> str:
    return match[0].replace("\n", " ")


def _content(segment: re.Match[str]) -> str:
    return next(part for part in segment.groups() if part is not None)


def _readable(phrase: str, words: bool) -> str:
    """Return the phrase if it reads as an answer, the last term of an equation ("10 - 3 = 7 apples"), or ''."""
    phrase = strip(phrase)
    value, last_term = plain(phrase), last_side(phrase)
    if isinstance(value, Quantity) or (words and value is not None):
        return phrase
    if (
        "," not in phrase
        and not _EQUATIONS.search(phrase)
        and isinstance(plain(last_term), Quantity)
        and not _is_equation(phrase)
    ):
        return last_term
    return phrase if _FORMULA.match(phrase) and not is_prose(phrase) else ""


def last_side(phrase: str) -> str:
    """Return what stands behind the last equals sign; all of the phrase if it has none, or is several equations."""
    return phrase if "," in phrase or _EQUATIONS.search(phrase) else _EQUALS.split(phrase)[-1].strip()


def named_value(phrase: str) -> str:
    """Return the value in `name = value`, '' for every other phrase."""
    sides = _EQUALS.split(phrase)
    return sides[1].strip() if len(sides) == 2 and _NAME.fullmatch(sides[0]) else ""


def relations(gold: str, answer: str) -> tuple[str, str] | None:
    r"""Return both formulas, `\ge 7` as the `x \ge 7` that math-verify reads; None where only one is a relation."""
    if (_OPEN_ENDED.search(gold) is None) != (_OPEN_ENDED.search(answer) is None):
        return None
    if not (_LEADING_RELATION.match(gold) or _LEADING_RELATION.match(answer)):
        return gold, answer
    sides = [_RELATION_OF_NAME.sub("", side, count=1) for side in (gold, answer)]
    if not all(map(_LEADING_RELATION.match, sides)):
        return None
    return f"x {sides[0]}", f"x {sides[1]}"


def _is_equation(phrase: str) -> bool:
    """Whether a phrase is an equation in its own right, `2x + y = 7`, and not a name or a calculation and its value."""
    sides = _EQUALS.split(phrase)
    if len(sides) != 2 or "<" in phrase or ">" in phrase:
        return False
    left = TEXT.sub("", sides[0])
    return any(letter.isalpha() for letter in left) and not _NAME.fullmatch(left) and not is_prose(left)


def _last_number(text: str) -> str:
    """Return the last number of a text; with a number in an expression, the expression up to the next blanks."""
    text = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)", " ", text)  # bold, not a power
    if isinstance(plain(text), Quantity):
        return strip(text)
    last = max(text.rfind(digit) for digit in "0123456789")
    if last < 0:
        return ""
    for token in _TOKEN.finditer(text):
        if token.end() > last:
            return "" if _is_denied(text, token.start()) or _has_rival(text, token) else strip(token[0])
    start = 1 + max(text.rfind(blank, 0, last) for blank in " \t\n")
    return strip(text[start:].split(None, 1)[0])


def _is_denied(text: str, start: int) -> bool:
    """Whether the text says of the answer at `start` what it is not, or only a bound of it."""
    return _DENIED.search(text, max(0, start - 80), start) is not None


def _has_rival(text: str, token: re.Match[str]) -> bool:
    """Whether "or" joins this number to another one, or to "more": "5 or 6", "6 or more", but not "1/2, or 0.5"."""
    if _OPEN_ENDED.match(text, token.end()):
        return True
    alternative = _ALTERNATIVE.search(text, max(0, token.start() - 80), token.start())
    other = plain(strip(alternative["other"])) if alternative else None
    return isinstance(other, Quantity) and not same(other, plain(strip(token[0])))
