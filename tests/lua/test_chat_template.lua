-- test_chat_template.lua: the Jinja that chat templates use, against what jinja2 writes (worked out with it beforehand,
-- under trim_blocks and lstrip_blocks), and what is refused, with the line. Whole templates are compared in
-- tests/golden and, on random ones, in tests/peers/templates.lua.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local template = require "lolcats.chat_template"

local MESSAGES = [=[[{"role": "system", "content": " be brief "}, {"role": "user", "content": "Hi \"there\""},
  {"role": "assistant", "content": null,
   "tool_calls": [{"function": {"name": "f", "arguments": {"z": 1, "a": [2.0, null, true]}}}]},
  {"role": "tool", "content": "ok"}]]=]
local TOOLS = [[ [{"type": "function", "function": {"name": "f", "description": "Größe & <b>",
  "parameters": {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"default": 1.0}}}}}] ]]

local function render(text, more)
  local variables = {messages = template.from_json(MESSAGES), tools = template.from_json(TOOLS), bos_token = "<s>",
                     n = 7, u = "straße Ünï", l = {3, 1, 2}}
  for key, value in pairs(more or {}) do variables[key] = value end
  return template.compile(text):render(variables)
end

local SAME = { -- template, what jinja2 writes
  {"{{ bos_token }}{% for m in messages %}{{ m.role }}{% if not loop.last %},{% endif %}{% endfor %}",
   "<s>system,user,assistant,tool"},
  {"{%- for m in messages if m['role'] == 'user' -%}\n  {{ loop.index }} {{ m.content | tojson }}\n{%- endfor -%}\n",
   '1 "Hi \\"there\\""'},
  {"{% if messages[0].role == 'system' %}\n  {{ messages[0].content | trim }}\n{% else %}\nno\n{% endif %}\nend\n",
   "  be brief\nend"},
  {"{{ messages[2].tool_calls[0].function.arguments | tojson }}", '{"z": 1, "a": [2.0, null, true]}'},
  {"{{ tools[0] | tojson(indent=2) }}",
   '{\n  "type": "function",\n  "function": {\n    "name": "f",\n    "description": '
   .. '"Größe & <b>",\n    "parameters": {\n      "type": "object",\n      "properties": {\n        "z": {\n'
   .. '          "type": ' .. '"integer"\n        },\n        "a": {\n          "default": 1.0\n        }\n      }\n    }\n  }\n}'},
  {"{% set ns = namespace(k=0) %}{% for x in l %}{% set ns.k = ns.k + x %}{% endfor %}{{ ns.k }}", "6"},
  {"{% for x in l %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% if x == 2 %}{% break %}{% endif %}{% endfor %}",
   "32"},
  {"{% macro f(a, b='x') %}[{{ a }}{{ b }}]{% endmacro %}{{ f(1) }}{{ f(1, b=2) }}", "[1x][12]"},
  {"{% macro f(a) %}{{ a }}{{ varargs }}{% endmacro %}{{ f(1, 2) }}", "1(2,)"},
  {"{{ messages[::-1] | map(attribute='role') | join(' ') }}", "tool assistant user system"},
  {"{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[-1]['content'][:1] }}", "1o"},
  {"{{ undefined_thing is defined }}{{ undefined_thing }}{{ undefined_thing | default('d') }}", "Falsed"},
  {"{{ messages[2].content is none }}{{ messages[2].content }}", "TrueNone"},
  {"{{ u | upper }} {{ u | title }} {{ u.capitalize() }} {{ 'ΟΔΟΣ' | lower }}",
   "STRASSE ÜNÏ Straße Ünï Straße ünï οδος"},
  {"{{ 7 / 2 }} {{ 6 / 2 }} {{ 7 // 2 }} {{ 7 % 3 }} {{ 2 ** 3 }} {{ 1.0 + 1 }} {{ '%05.1f|%s' % (n, 'x') }}",
   "3.5 3.0 3 1 8 2.0 007.0|x"},
  {"{{ (1, 'a') }} {{ [1, [none]] }} {{ {'a': 1.0} }} {{ (1,) == [1] }}", "(1, 'a') [1, [None]] {'a': 1.0} False"},
  {"{{ 'a-b-c'.split('-', 1) }} {{ ' x '.strip() }} {{ 'abc'.replace('b', '') }} {{ 'a,b'.partition(',') }}",
   "['a', 'b-c'] x ac ('a', ',', 'b')"},
  {"{{ '{} is {:>4}'.format('x', n) }} {{ 'ab'.rjust(4, '.') }} {{ '7'.zfill(3) }}", "x is    7 ..ab 007"},
  {"{% for k, v in messages[1].items() %}{{ k }}={{ v }};{% endfor %}", 'role=user;content=Hi "there";'},
  {"{% for k, g in messages | groupby('role') %}{{ k }}{{ g | length }} {% endfor %}",
   "assistant1 system1 tool1 user1 "},
  {"a {#- note -#} b {% raw %}{{ x }}{% endraw %}", "ab {{ x }}"},
  {"{% generation %}x{% endgeneration %}{% set y %}<{{ n }}>{% endset %}{{ y }}{% filter upper %}q{% endfilter %}",
   "x<7>Q"},
  {"{{ 'yes' if tools else 'no' }}{{ 1 in l }}{{ 'z' not in 'abc' }}{{ n is odd }}{{ not l }}", "yesTrueTrueTrueFalse"},
  {"{{ l | sort }}{{ l | sort(reverse=true) | first }}{{ range(3) | list }}{{ l | sum }}{{ l | max }}",
   "[1, 2, 3]3[0, 1, 2]63"},
}
for i, case in ipairs(SAME) do
  t.test("template " .. i, function() t.eq(render(case[1]), case[2]) end)
end

local REFUSED = { -- template, a pattern of the message
  {"a\n{% include 'x' %}", "line 2: the tag {%% include %%} is not supported"},
  {"{{ n | pprint }}", "line 1: the filter 'pprint' is not supported"},
  {"{{ n is klingon }}", "the test 'is klingon' is not supported"},
  {"{{ u.encode() }}", "the function or method 'encode' is not supported"},
  {"{{ cycler('a') }}", "'cycler' is not supported"},
  {"\n\n{% if n %}", "line 3: {%% if %%} without its end"},
  {"{{ n", "line 1: {{ without }}"},
  {"{{ 'a }}", "closing"},
  {"{{ n + }}", "expected a value"},
  {"{{ none.x.y }}", "undefined"},
  {"{{ 1 / 0 }}", "division by zero"},
  {"{{ 'a' + 1 }}", "cannot compute a string %+ a number"},
  {"{{ raise_exception('no ' + messages[0].role) }}", "no system"},
  {"{{ 'x' * 100000000 }}", "ten million"},
}
for i, case in ipairs(REFUSED) do
  t.test("refused " .. i, function() t.errors(function() render(case[1]) end, case[2]) end)
end

t.test("values out of Lua and out of a JSON library", function()
  local files = require "lolcats.files"
  local read = files.parse_json('[{"role": "user", "content": null, "list": []}]')
  t.eq(render("{{ messages[0].content }}{{ messages[0].list }}{{ messages[0].content is none }}", {messages = read}),
       "None[]True")
  t.eq(render("{{ x | tojson }}", {x = {b = 1, a = "é"}}), '{"a": "é", "b": 1}')
end)

t.finish()
