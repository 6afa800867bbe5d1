"""templates.py FILE [SEED] [COUNT]: random chat templates with what jinja2 renders them to, set up as transformers
does, for templates.lua to compare with. FILE is a JSON list of {template, text}; text is null where jinja2 raises an
error.
"""
import json
import random
import sys

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

R = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
COUNT = int(sys.argv[3]) if len(sys.argv) > 3 else 4000
VARIABLES = json.load(open(__file__.replace("templates.py", "templates.json"), encoding="utf-8"))


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_run"), [], [], body).set_lineno(line)

    @jinja2.pass_eval_context
    def _run(self, context, caller):
        return caller()


def refuse(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
ENVIRONMENT.filters["tojson"] = tojson
ENVIRONMENT.globals["raise_exception"] = refuse

# ---- a grammar: "X" draws a rule of that name, anything else is itself
# -------------------------------------------------
RULES = {
    "NAME": "s e n m z f t no none l ls el d ed lo multi u missing bos_token".split(),
    "LITERAL": ["1", "0", "-1", "10", "'a'", "\"A b\"", "''", "'\\n'", "'it\\'s'", "true", "none", "False", "[]",
                "[1, 2]",
                "{'a': 1}", "(1, 2)", "1.5", "2.0", "'ü'", "{'k': [1], 'j': 'v'}", "('x')", "('a',)"],
    "TEXT": ["s", "u", "multi", "e", "'a-b-c'", "ls[0]", "lo[0].role", "d.a", "'  pad '", "('q' ~ n)"],
    "LIST": ["l", "ls", "el", "lo", "[1, 2, 3]", "s.split()", "multi.split(',')", "d.c", "l[1:]", "lo[::-1]"],
    "DICT": ["d", "ed", "lo[1]", "{'x': 1, 'y': [2]}", "dict(a=1)"],
    "NUMBER": ["n", "m", "z", "2", "(n + 1)", "l[0]", "ls | length", "l | sum", "f"],
    "METHOD": [x.split("@") for x in (
        "strip()@upper()@lower()@title()@capitalize()@split()@split('b')@split(' ', 1)@rsplit('-', 1)@startswith('a')@"
        "endswith(('b', 'c'))@replace('a', 'ZZ')@lstrip('a ')@rstrip()@find('b')@count('a')@splitlines()@isdigit()@"
        "partition('b')@zfill(9)@center(12)@ljust(9)@rjust(9, '*')@rfind('b')@swapcase()@isupper()@removeprefix('a')"
    ).split("\n")][0],
    "FILTERED": ["TEXT | trim", "TEXT | upper", "TEXT | title", "TEXT | capitalize", "TEXT | length", "LIST | length",
                 "LIST | first", "LIST | last", "LIST | join(', ')", "EXPR | tojson", "EXPR | tojson(indent=2)",
                 "EXPR | string",
                 "LIST | list", "DICT | items | list", "DICT | dictsort", "LIST | reverse | list", "ls | sort",
                 "l | sort(reverse=true)",
                 "lo | map(attribute='content') | list", "lo | selectattr('role', 'equalto', 'user') | list",
                 "lo | rejectattr('content') | list", "l | select('odd') | list", "ls | map('upper') | list",
                 "EXPR | default('D')", "EXPR | default('D', true)", "NUMBER | abs", "NUMBER | float",
                 "TEXT | replace('a', 'b')",
                 "'12' | int", "f | int", "TEXT | indent(2)", "TEXT | wordcount", "ls | unique | list", "l | max",
                 "f | round",
                 "2.567 | round(2)", "TEXT | e", "lo | groupby('role') | list", "l | batch(2, 0) | list",
                 "l | slice(2) | list"],
    "TESTED": ["EXPR is KIND", "EXPR is not KIND", "n is odd", "n is divisibleby 3", "EXPR is eq(LITERAL)",
               "LITERAL is in LIST",
               "TEXT is lower"],
    "KIND": "defined none string number mapping iterable sequence integer float boolean true".split(),
    "EXPR": ["LITERAL", "NAME", "NAME", "TEXT.METHOD", "(FILTERED)", "(FILTERED)", "(TESTED)", "(EXPR == EXPR)",
             "(EXPR in EXPR)",
             "(EXPR < EXPR)", "(EXPR and EXPR)", "(EXPR or not EXPR)", "(EXPR + EXPR)", "(EXPR ~ EXPR)",
             "(NUMBER * EXPR)",
             "(NUMBER / NUMBER)", "(NUMBER // 2)", "(NUMBER % 2)", "(EXPR if EXPR else EXPR)", "(EXPR if EXPR)",
             "LIST[0]",
             "LIST[-1]", "TEXT[::-1]", "LIST[1:]", "TEXT[:2]", "DICT.a", "DICT['c']", "DICT.get('zz', 1)", "DICT.role",
             "[EXPR, EXPR]", "{'p': EXPR}"],
    "SPACE": ["", " ", "\n", "  \n  ", "\n\n", "\t", "x", "  y", " z\n"],
    "OPEN": ["{%", "{%-", "{%", "{%+"], "CLOSE": ["%}", "-%}", "%}"],
    "SAY": ["{{ EXPR }}", "{{- EXPR -}}", "{{ EXPR -}}"],
    "LOOP": ["loop.index", "loop.index0", "loop.first", "loop.last", "loop.revindex", "loop.length", "x",
             "loop.previtem",
             "loop.cycle('a', 'b')", "k", "v"],
    "OVER": ["x in LIST", "k, v in DICT.items()", "k, v in DICT | items", "x in LIST if x", "x in TEXT",
             "x in missing", "k in d",
             "x in lo if x.role == 'user'"],
    "BLOCK": ["SAY", "SAY", "SAY", "{# note #}", "OPEN if EXPR CLOSEBODYOPEN endif CLOSE",
              "OPEN if EXPR CLOSEBODYOPEN elif EXPR CLOSEBODYOPEN else CLOSEBODYOPEN endif CLOSE",
              "OPEN for OVER CLOSESPACE{{ LOOP }}BODYOPEN endfor CLOSE",
              "OPEN for OVER CLOSEBODYOPEN if loop.index > 1 CLOSE{% break %}{% endif %}wOPEN else CLOSEBODY"
              "OPEN endfor CLOSE",
              "OPEN set y = EXPR CLOSE{{ y }}", "OPEN set y CLOSEBODYOPEN endset CLOSE{{ y }}",
              "OPEN set n = n + 1 CLOSE{{ n }}",
              "OPEN set ns = namespace(a=1) CLOSE{% set ns.a = EXPR %}{{ ns.a }}",
              "OPEN macro mm(a, b=2) CLOSE{{ a }}{{ b }}BODYOPEN endmacro CLOSE{{ mm(EXPR, b=EXPR) }}",
              "OPEN filter upper CLOSEBODYOPEN endfilter CLOSE", "OPEN with q = EXPR CLOSE{{ q }}OPEN endwith CLOSE",
              "OPEN generation CLOSEBODYOPEN endgeneration CLOSE", "{% raw %} {{ x }} {% endraw %}"],
    "BODY": ["SPACE", "SPACEBLOCKSPACE", "SPACEBLOCKSPACE"],
    "START": ["SPACEBLOCKSPACE", "SPACEBLOCKSPACEBLOCKSPACE", "SAY"],
}
NAMES = sorted(RULES, key=len, reverse=True)


def draw(rule, depth):
    choices = RULES[rule]
    if depth <= 0 and rule in ("EXPR", "BLOCK", "BODY"):
        choices = choices[:2]
    text, out = R.choice(choices), ""
    while text:
        name = next((n for n in NAMES if text.startswith(n)), None)
        out += draw(name, depth - (rule in ("EXPR", "BLOCK"))) if name else text[0]
        text = text[len(name):] if name else text[1:]
    return out


def rendered(template):
    try:
        text = ENVIRONMENT.from_string(template).render(documents=None, **VARIABLES)
    except Exception:
        return None
    # what Python writes for its own kinds of objects is not compared
    return None if any(x in text for x in (" object ", "<bound", "<built-in", "dict_items", "range(",
                                           "Markup(")) else text


cases = []
for _ in range(COUNT):
    template = draw("START", 3)
    cases.append(dict(template=template, text=rendered(template)))
json.dump(cases, open(sys.argv[1], "w"))
