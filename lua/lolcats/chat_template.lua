--- Chat templates: the part of Jinja that real models' templates use, rendered as Hugging Face renders them
-- (trim_blocks, lstrip_blocks, tojson without HTML escapes). A template is parsed into a tree once and walked for each
-- rendering.
--
--     local t = template.compile(text)
--     local s = t:render{messages = {{role = "user", content = "Hi"}}, add_generation_prompt = true, bos_token = "<s>"}
--
-- Values: Lua strings, numbers and booleans; a table is a list when it has [1] or is empty, else a mapping.
-- template.null is None (so are JSON libraries' null userdata); a missing variable is undefined, as in Jinja, but
-- `tools` and `documents` are None when not given, as in Hugging Face. template.object(t, keys) marks a mapping and may
-- give the order of its keys; template.list(t) marks an empty list; template.from_json(text) keeps the order that the
-- text has.

local core = require "lolcats.core.text"
local cut = require "lolcats.chat_template_lexer"
local filters = require "lolcats.chat_template_filters"
local values = require "lolcats.chat_template_values"
require "lolcats.chat_template_methods"

local template = {null = values.null, object = values.object, list = values.list}

--- A JSON text as values for templates: tools, for example, whose keys a template writes in the order given.
function template.from_json(text) return core.parse_ordered(text, values) end

local null, undefined, is_undefined = values.null, values.undefined, values.is_undefined
local truthy, to_string, fail = values.truthy, values.to_string, values.fail

-- Expressions ---------------------------------------------------------------------------------------------------------
-- A parser is {tokens, at}; a node is a table with `kind` and `line`.

local Parser = {}
Parser.__index = Parser

function Parser:peek() return self.tokens[self.at] end

function Parser:next()
  local token = self.tokens[self.at]
  self.at = self.at + 1
  return token
end

function Parser:is(text, kind)
  local token = self.tokens[self.at]
  return token.text == text and token.kind == (kind or "op")
end

function Parser:take(text, kind)
  if self:is(text, kind) then return self:next() end
end

function Parser:expect(text, kind)
  local token = self:take(text, kind)
  if not token then fail(self:peek().line, ("expected '%s', found '%s'"):format(text, self:peek().text)) end
  return token
end

function Parser:name()
  local token = self:next()
  if token.kind ~= "name" then fail(token.line, ("expected a name, found '%s'"):format(token.text)) end
  return token.text
end

function Parser:done()
  if self:peek().kind ~= "end" then fail(self:peek().line, ("unexpected '%s'"):format(self:peek().text)) end
end

local literals = {["true"] = true, True = true, ["false"] = false, False = false, none = null, None = null}

--- Positional and named arguments up to the closing parenthesis.
function Parser:arguments()
  local args, named = {}, {}
  while not self:take(")") do
    local after = self.tokens[self.at + 1]
    if self:peek().kind == "name" and after.text == "=" and after.kind == "op" then
      local name = self:name()
      self:next()
      named[#named + 1] = {name, self:expression()}
    elseif self:is("*") or self:is("**") then
      fail(self:peek().line, "arguments with * are not supported")
    else
      args[#args + 1] = self:expression()
    end
    if not self:take(",") and not self:is(")") then self:expect(")") end
  end
  return args, named
end

function Parser:items(close)
  local items = {}
  while not self:take(close) do
    items[#items + 1] = self:expression()
    if not self:take(",") and not self:is(close) then self:expect(close) end
  end
  return items
end

function Parser:mapping(line)
  local keys, items = {}, {}
  while not self:take("}") do
    keys[#keys + 1] = self:expression()
    self:expect(":")
    items[#items + 1] = self:expression()
    if not self:take(",") and not self:is("}") then self:expect("}") end
  end
  return {kind = "dict", line = line, keys = keys, items = items}
end

function Parser:primary()
  local token = self:next()
  local line = token.line
  if token.kind == "string" then
    local text = token.text
    while self:peek().kind == "string" do text = text .. self:next().text end
    return {kind = "literal", line = line, value = text}
  elseif token.kind == "number" then
    return {kind = "literal", line = line, value = token.value}
  elseif token.kind == "name" then
    if literals[token.text] ~= nil then return {kind = "literal", line = line, value = literals[token.text]} end
    return {kind = "name", line = line, name = token.text}
  elseif token.text == "(" then
    if self:take(")") then return {kind = "list", tuple = true, line = line, items = {}} end
    local first = self:expression()
    if self:take(")") then return first end
    self:expect(",")
    local items = self:items(")")
    table.insert(items, 1, first)
    return {kind = "list", tuple = true, line = line, items = items}
  elseif token.text == "[" then
    return {kind = "list", line = line, items = self:items("]")}
  elseif token.text == "{" then
    return self:mapping(line)
  end
  fail(line, ("expected a value, found '%s'"):format(token.text))
end

function Parser:subscript(object, line)
  local first, colon = nil, false
  local part = {}
  if not self:is(":") then first = self:expression() end
  part[1] = first
  local n = 1
  while self:take(":") do
    colon, n = true, n + 1
    if not self:is(":") and not self:is("]") then part[n] = self:expression() end
  end
  self:expect("]")
  if not colon then return {kind = "item", line = line, object = object, key = first} end
  return {kind = "slice", line = line, object = object, from = part[1], to = part[2], step = part[3]}
end

function Parser:call(callee, line)
  local args, named = self:arguments()
  return {kind = "call", line = line, callee = callee, args = args, named = named}
end

function Parser:postfix(node)
  while true do
    local line = self:peek().line
    if self:take(".") then
      local token = self:next()
      if token.kind == "number" then
        node = {kind = "item", line = line, object = node, key = {kind = "literal", line = line, value = token.value}}
      elseif token.kind == "name" then
        node = {kind = "attribute", line = line, object = node, name = token.text}
      else
        fail(line, "expected a name after '.'")
      end
    elseif self:take("[") then node = self:subscript(node, line)
    elseif self:take("(") then node = self:call(node, line)
    else return node end
  end
end

local argument_start = {name = true, string = true, number = true}
local no_argument = {["else"] = true, ["or"] = true, ["and"] = true, ["is"] = true, ["if"] = true}

function Parser:test(node, line)
  local negated = self:take("not", "name") ~= nil
  local name = self:next().text
  local args = {}
  if self:take("(") then
    args = self:arguments()
  elseif (argument_start[self:peek().kind] and not (self:peek().kind == "name" and no_argument[self:peek().text]))
      or self:is("[") or self:is("{") then
    args = {self:postfix(self:primary())}
  end
  node = {kind = "test", line = line, name = name, value = node, args = args}
  return negated and {kind = "not", line = line, value = node} or node
end

function Parser:filters(node)
  while true do
    local line = self:peek().line
    if self:take("|") then
      local name = self:name()
      while self:take(".") do name = name .. "." .. self:name() end
      local args, named = {}, {}
      if self:take("(") then args, named = self:arguments() end
      node = {kind = "filter", line = line, name = name, value = node, args = args, named = named}
    elseif self:take("is", "name") then node = self:test(node, line)
    elseif self:take("(") then node = self:call(node, line)
    else return node end
  end
end

function Parser:unary(with_filters)
  local line = self:peek().line
  local node
  if self:take("-") then node = {kind = "negate", line = line, value = self:unary(false)}
  elseif self:take("+") then node = self:unary(false)
  else node = self:primary() end
  node = self:postfix(node)
  return with_filters and self:filters(node) or node
end

-- Binary operators, loosest first; each level reads the next one.
local levels = {{["+"] = true, ["-"] = true}, {["~"] = true}, {["*"] = true, ["/"] = true, ["//"] = true, ["%"] = true},
                {["**"] = true}}

function Parser:binary(level)
  if level > #levels then return self:unary(true) end
  local node = self:binary(level + 1)
  while self:peek().kind == "op" and levels[level][self:peek().text] do
    local token = self:next()
    node = {kind = "binary", line = token.line, op = token.text, left = node, right = self:binary(level + 1)}
  end
  return node
end

local comparisons = {["=="] = true, ["!="] = true, ["<"] = true, [">"] = true, ["<="] = true, [">="] = true}

function Parser:compare()
  local first, line = self:binary(1), self:peek().line
  local ops, operands = {}, {first}
  while true do
    local token = self:peek()
    if token.kind == "op" and comparisons[token.text] then
      ops[#ops + 1] = self:next().text
    elseif self:take("in", "name") then
      ops[#ops + 1] = "in"
    elseif self:is("not", "name") and self.tokens[self.at + 1].text == "in" then
      self.at = self.at + 2
      ops[#ops + 1] = "not in"
    else
      break
    end
    operands[#operands + 1] = self:binary(1)
  end
  return #ops == 0 and first or {kind = "compare", line = line, ops = ops, operands = operands}
end

function Parser:negation()
  local line = self:peek().line
  if self:take("not", "name") then return {kind = "not", line = line, value = self:negation()} end
  return self:compare()
end

function Parser:conjunction()
  local node = self:negation()
  while self:is("and", "name") do
    node = {kind = "and", line = self:next().line, left = node, right = self:negation()}
  end
  return node
end

function Parser:disjunction()
  local node = self:conjunction()
  while self:is("or", "name") do
    node = {kind = "or", line = self:next().line, left = node, right = self:conjunction()}
  end
  return node
end

function Parser:expression()
  local node = self:disjunction()
  while self:is("if", "name") do
    local line = self:next().line
    local condition = self:disjunction()
    local otherwise = self:take("else", "name") and self:expression() or nil
    node = {kind = "choice", line = line, condition = condition, value = node, otherwise = otherwise}
  end
  return node
end

-- An expression, or several with commas between them: a list.
function Parser:tuple()
  local line = self:peek().line
  local first = self:expression()
  if not self:is(",") then return first end
  local items = {first}
  while self:take(",") do
    if self:peek().kind == "end" then break end
    items[#items + 1] = self:expression()
  end
  return {kind = "list", tuple = true, line = line, items = items}
end

-- Statements ----------------------------------------------------------------------------------------------------------
-- A reader is {parts, at}; block(ends) reads up to one of the tags named there and returns the body, that tag's name
-- and its parser.

local Reader = {}
Reader.__index = Reader
local statements = {}

function Reader:block(ends, opened, line)
  local body = {}
  while true do
    local part = self.parts[self.at]
    if not part then
      if not ends then return body end
      fail(line, ("{%% %s %%} without its end"):format(opened))
    end
    self.at = self.at + 1
    if part.kind == "text" then
      body[#body + 1] = part
    else
      local parser = setmetatable({tokens = part.tokens, at = 1}, Parser)
      if part.kind == "{{" then
        body[#body + 1] = {kind = "output", line = part.line, value = parser:tuple()}
        parser:done()
      else
        local name = parser:name()
        if ends and ends[name] then return body, name, parser end
        if not statements[name] then fail(part.line, ("the tag {%% %s %%} is not supported"):format(name)) end
        body[#body + 1] = statements[name](self, parser, part.line)
      end
    end
  end
end

--- Does a tag from the part at `first` on, up to here, name this variable?
function Reader:mentions(name, first)
  for i = first, self.at - 1 do
    for _, token in ipairs(self.parts[i].tokens or {}) do
      if token.kind == "name" and token.text == name then return true end
    end
  end
  return false
end

-- "a", "a, b" or "(a, b)" on the left of `in` or `=`.
local function targets(parser)
  local open, names = parser:take("("), {}
  repeat names[#names + 1] = parser:name() until not parser:take(",")
  if open then parser:expect(")") end
  return names
end

statements["for"] = function(reader, parser, line)
  local node = {kind = "for", line = line, names = targets(parser)}
  parser:expect("in", "name")
  node.list = parser:disjunction() -- `if` behind it is the loop's filter
  if parser:take("if", "name") then node.condition = parser:expression() end
  if parser:is("recursive", "name") then fail(line, "recursive loops are not supported") end
  parser:done()
  local ended
  node.body, ended = reader:block({["else"] = true, ["endfor"] = true}, "for", line)
  if ended == "else" then node.otherwise = reader:block({["endfor"] = true}, "for", line) end
  return node
end

statements["if"] = function(reader, parser, line)
  local node = {kind = "if", line = line, conditions = {}, bodies = {}}
  local ends, ended = {["elif"] = true, ["else"] = true, ["endif"] = true}, "if"
  while ended ~= "endif" do
    local i = #node.bodies + 1
    if ended ~= "else" then
      node.conditions[i] = parser:tuple()
    else
      ends = {["endif"] = true}
    end
    parser:done()
    node.bodies[i], ended, parser = reader:block(ends, "if", line)
  end
  return node
end

statements["set"] = function(reader, parser, line)
  local first = parser:name()
  local node = {kind = "set", line = line}
  if parser:take(".") then
    node.object, node.attribute = first, parser:name()
  else
    node.names = {first}
    while parser:take(",") do node.names[#node.names + 1] = parser:name() end
  end
  if parser:take("=") then
    node.value = parser:tuple()
    parser:done()
  else
    node.filtered = parser:filters({kind = "captured", line = line})
    parser:done()
    node.body = reader:block({["endset"] = true}, "set", line)
  end
  return node
end

statements["filter"] = function(reader, parser, line)
  table.insert(parser.tokens, parser.at, {kind = "op", text = "|", line = line})
  local node = {kind = "filtered", line = line, filtered = parser:filters({kind = "captured", line = line})}
  parser:done()
  node.body = reader:block({["endfilter"] = true}, "filter", line)
  return node
end

statements["macro"] = function(reader, parser, line)
  local node = {kind = "macro", line = line, name = parser:name(), parameters = {}, defaults = {}}
  parser:expect("(")
  while not parser:take(")") do
    node.parameters[#node.parameters + 1] = parser:name()
    if parser:take("=") then node.defaults[#node.parameters] = parser:expression() end
    if not parser:take(",") and not parser:is(")") then parser:expect(")") end
  end
  parser:done()
  local first = reader.at
  node.body = reader:block({["endmacro"] = true}, "macro", line)
  node.takes_more = {varargs = reader:mentions("varargs", first), kwargs = reader:mentions("kwargs", first)}
  return node
end

statements["with"] = function(reader, parser, line)
  local node = {kind = "with", line = line, names = {}, items = {}}
  while parser:peek().kind == "name" do
    node.names[#node.names + 1] = parser:name()
    parser:expect("=")
    node.items[#node.items + 1] = parser:expression()
    if not parser:take(",") then break end
  end
  parser:done()
  node.body = reader:block({["endwith"] = true}, "with", line)
  return node
end

-- Hugging Face marks the assistant's words with it; it leaves no trace in the text.
statements["generation"] = function(reader, _, line)
  local body = reader:block({["endgeneration"] = true}, "generation", line)
  return {kind = "with", line = line, names = {}, items = {}, body = body}
end

statements["break"] = function(_, _, line) return {kind = "break", line = line} end
statements["continue"] = function(_, _, line) return {kind = "continue", line = line} end

-- Running -------------------------------------------------------------------------------------------------------------
-- run(node, scope, out) appends to out and returns "break", "continue" or nil; eval(node, scope) returns a value.

local eval, run_all
local evaluators, runners = {}, {}

function eval(node, scope) return evaluators[node.kind](node, scope) end

local function inner_scope(scope) return setmetatable({}, {__index = scope}) end

local function evaluate_arguments(node, scope)
  local args, named = {}, {}
  for i = 1, #node.args do args[i] = eval(node.args[i], scope) end
  for _, pair in ipairs(node.named or {}) do named[pair[1]] = eval(pair[2], scope) end
  return args, named
end

function evaluators.literal(node) return node.value end

function evaluators.name(node, scope)
  local value = scope[node.name]
  if value == nil then return undefined(node.name) end
  return values.incoming(value)
end

function evaluators.list(node, scope)
  local out = {}
  for i, item in ipairs(node.items) do out[i] = eval(item, scope) end
  return node.tuple and values.tuple(out) or values.list(out)
end

function evaluators.dict(node, scope)
  local out, order = {}, {}
  for i, item in ipairs(node.items) do
    local key = eval(node.keys[i], scope)
    if out[key] == nil then order[#order + 1] = key end
    out[key] = eval(item, scope)
  end
  return values.object(out, order)
end

function evaluators.attribute(node, scope) return values.attribute(eval(node.object, scope), node.name, node.line) end
function evaluators.item(node, scope) return values.item(eval(node.object, scope), eval(node.key, scope), node.line) end

function evaluators.slice(node, scope)
  local function bound(part)
    local value = part and eval(part, scope)
    return value ~= null and value or nil
  end
  return values.slice(eval(node.object, scope), bound(node.from), bound(node.to), bound(node.step), node.line)
end

function evaluators.call(node, scope)
  local callee = eval(node.callee, scope)
  if type(callee) ~= "function" then
    local what = node.callee.name or "this value"
    fail(node.line, is_undefined(callee) and ("the function or method '%s' is not supported"):format(what)
                    or ("'%s' is no function"):format(what))
  end
  local args, named = evaluate_arguments(node, scope)
  return callee(args, named, node.line)
end

evaluators["not"] = function(node, scope) return not truthy(eval(node.value, scope)) end

evaluators["and"] = function(node, scope)
  local left = eval(node.left, scope)
  if truthy(left) then return eval(node.right, scope) end
  return left
end

evaluators["or"] = function(node, scope)
  local left = eval(node.left, scope)
  if truthy(left) then return left end
  return eval(node.right, scope)
end

function evaluators.choice(node, scope)
  if truthy(eval(node.condition, scope)) then return eval(node.value, scope) end
  if node.otherwise then return eval(node.otherwise, scope) end
  return undefined("the else of an inline if")
end

function evaluators.negate(node, scope) return values.arithmetic("-", 0, eval(node.value, scope), node.line) end

-- What `safe` and `escape` give is marked as markup in Jinja: added to it, any other text is escaped. Here the mark is
-- read off the expression; it does not outlive a variable.
local function is_markup(node)
  if node.kind == "filter" then return node.name == "safe" or node.name == "escape" or node.name == "e" end
  return node.kind == "binary" and node.op == "+" and (is_markup(node.left) or is_markup(node.right))
end

function evaluators.binary(node, scope)
  local left, right = eval(node.left, scope), eval(node.right, scope)
  if node.op == "+" and type(left) == "string" and type(right) == "string" then
    local a, b = is_markup(node.left), is_markup(node.right)
    if a and not b then right = filters.escape(right) elseif b and not a then left = filters.escape(left) end
  end
  return values.arithmetic(node.op, left, right, node.line)
end

function evaluators.compare(node, scope)
  local left = eval(node.operands[1], scope)
  for i, op in ipairs(node.ops) do
    local right = eval(node.operands[i + 1], scope)
    if not values.compare(op, left, right, node.line) then return false end
    left = right
  end
  return true
end

function evaluators.filter(node, scope)
  local filter = filters[node.name]
  if not filter then fail(node.line, ("the filter '%s' is not supported"):format(node.name)) end
  local args, named = evaluate_arguments(node, scope)
  return filter(eval(node.value, scope), args, named, node.line)
end

function evaluators.test(node, scope)
  local test = values.tests[node.name]
  if not test then fail(node.line, ("the test 'is %s' is not supported"):format(node.name)) end
  local args = evaluate_arguments(node, scope)
  return test(eval(node.value, scope), args[1], node.line) and true or false
end

function evaluators.captured(_, scope) return scope[evaluators] end

function run_all(body, scope, out)
  for i = 1, #body do
    local node = body[i]
    if node.kind == "text" then
      out[#out + 1] = node.text
    else
      local signal = runners[node.kind](node, scope, out)
      if signal then return signal end
    end
  end
end

function runners.output(node, scope, out) out[#out + 1] = to_string(eval(node.value, scope)) end
runners["break"] = function() return "break" end
runners["continue"] = function() return "continue" end

runners["if"] = function(node, scope, out)
  for i, body in ipairs(node.bodies) do
    if not node.conditions[i] or truthy(eval(node.conditions[i], scope)) then return run_all(body, scope, out) end
  end
end

local function assign(scope, names, value, line)
  if #names == 1 then
    rawset(scope, names[1], value)
    return
  end
  local items = values.iterate(value, line)
  if #items ~= #names then fail(line, ("%d values for %d names"):format(#items, #names)) end
  for i, name in ipairs(names) do rawset(scope, name, items[i]) end
end

-- What a block writes, through its filters; the text waits in the scope under a key that no name can have.
local function capture(node, scope)
  local captured, inner = {}, inner_scope(scope)
  run_all(node.body, inner, captured)
  inner[evaluators] = table.concat(captured)
  return eval(node.filtered, inner)
end

function runners.filtered(node, scope, out) out[#out + 1] = to_string(capture(node, scope)) end

function runners.set(node, scope)
  local value
  if node.value then value = eval(node.value, scope) else value = capture(node, scope) end
  if node.names then return assign(scope, node.names, value, node.line) end
  local object = scope[node.object]
  if not values.is_namespace(object) then fail(node.line, ("'%s' is no namespace"):format(node.object)) end
  rawset(object, node.attribute, value)
end

runners["for"] = function(node, scope, out)
  local items = values.iterate(eval(node.list, scope), node.line)
  if node.condition then
    local kept = {}
    for _, item in ipairs(items) do
      local inner = inner_scope(scope)
      assign(inner, node.names, item, node.line)
      if truthy(eval(node.condition, inner)) then kept[#kept + 1] = item end
    end
    items = kept
  end
  if #items == 0 and node.otherwise then return run_all(node.otherwise, inner_scope(scope), out) end
  local loop = values.loop(items)
  for i, item in ipairs(items) do
    local inner = inner_scope(scope)
    loop:at(i)
    rawset(inner, "loop", loop)
    assign(inner, node.names, item, node.line)
    if run_all(node.body, inner, out) == "break" then break end
  end
end

runners["with"] = function(node, scope, out)
  local inner = inner_scope(scope)
  for i, name in ipairs(node.names) do rawset(inner, name, eval(node.items[i], scope)) end
  return run_all(node.body, inner, out)
end

function runners.macro(node, scope)
  rawset(scope, node.name, function(args, named, line)
    local inner, out = inner_scope(scope), {}
    local known, more = {}, values.tuple{}
    for _, name in ipairs(node.parameters) do known[name] = true end
    for i = #node.parameters + 1, #args do more[#more + 1] = args[i] end
    if #more > 0 and not node.takes_more.varargs then
      fail(line, ("too many arguments for the macro '%s'"):format(node.name))
    end
    local others = values.object({})
    for name, value in pairs(named) do if not known[name] then others[name] = value end end
    if next(others) and not node.takes_more.kwargs then
      fail(line, ("the macro '%s' takes no argument '%s'"):format(node.name, next(others)))
    end
    rawset(inner, "varargs", more)
    rawset(inner, "kwargs", others)
    for i, name in ipairs(node.parameters) do
      local value = args[i]
      if value == nil then value = named[name] end
      if value == nil and node.defaults[i] then value = eval(node.defaults[i], inner) end
      if value == nil then value = undefined(name) end
      rawset(inner, name, value)
    end
    run_all(node.body, inner, out)
    return table.concat(out)
  end)
end

-- The public face -----------------------------------------------------------------------------------------------------

local Template = {}
Template.__index = Template

--- Renders with the given variables. Errors are strings that name the line of the template.
function Template:render(variables)
  local scope = inner_scope(values.globals)
  rawset(scope, "tools", null)
  rawset(scope, "documents", null)
  rawset(scope, "add_generation_prompt", false)
  for name, value in pairs(variables or {}) do rawset(scope, name, value) end
  local out = {}
  run_all(self.body, inner_scope(scope), out)
  return table.concat(out)
end

function template.compile(text)
  if type(text) ~= "string" then error("chat template: expected its text, got " .. type(text), 2) end
  local reader = setmetatable({parts = cut(text), at = 1}, Reader)
  return setmetatable({body = reader:block()}, Template)
end

return template
