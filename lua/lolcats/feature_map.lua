-- feature_map.lua: the maps that turn queries and keys into the features of linear attention. A map here is a table
-- with init (makes the parameters of one layer and side) and forward (rows to features); the built-in ones also know
-- the name under which the fused attention op computes them itself. Also reads and writes the source of custom maps.
local lc = require "lolcats"
local files = require "lolcats.files"
local kernels = require "lolcats.maps.kernels"
local activations = require "lolcats.maps.activations"

local M = {}

-- A map as a recipe sees it: `lc.feature_map{...}`. Instances (one a layer and side) inherit from it.
local Map = {}
Map.__index = Map

local Instance = {} -- methods shared by every instance, found after the instance's and the map's own fields

local function instance_meta(map)
    return {
        __index = function(_, key)
            local v = map[key]
            if v == nil then v = Instance[key] end
            return v
        end,
    }
end

local function is_param(v) return lc.is_tensor(v) end

--- Names and tensors of an instance's parameters, sorted by name, so that the order never depends on table order.
function Instance.parameters(self)
    local out = {}
    for name, v in pairs(self) do
        if type(name) == "string" and is_param(v) then out[#out + 1] = { name = name, tensor = v } end
    end
    table.sort(out, function(a, b)
        local x, y = a.name:match "^layer" ~= nil, b.name:match "^layer" ~= nil
        if x ~= y then return x end
        return a.name < b.name
    end)
    return out
end

--- Features of x [b, h, t, d]; checks what came back, since a custom map is a user's code.
function Instance.features(self, x, ctx)
    local map = getmetatable(self).map
    ctx = ctx or {}
    ctx.pos = ctx.pos or lc.arange(0, x:size(3), 1, { dtype = "i32", device = x.device })
    local y = map.forward(self, x, ctx)
    if not lc.is_tensor(y) then
        lc.fail("feature map '%s': forward must return a tensor, it returned a %s", map.name, type(y))
    end
    local s, t = x.shape, y.shape
    if #t ~= 4 or t[1] ~= s[1] or t[2] ~= s[2] or t[3] ~= s[3] then
        lc.fail("feature map '%s': forward got x [%s] and returned [%s]; expected [%d, %d, %d, features]", map.name,
                table.concat(s, ", "), table.concat(t, ", "), s[1], s[2], s[3])
    end
    return y
end

--- A new instance for `heads` query heads of size `dim`. like: an instance whose values it copies (the k side of a
--- layer starts as a copy of the q side). where: {dtype, device} of the frozen weights, options. Tensors that the map
--- names in `buffers` are kept and saved with the others, but not trained.
function Map:instance(heads, dim, where, like)
    local inst = setmetatable({}, self.meta)
    where = where or {}
    inst.options = where.options or {}
    local function own(name, t)
        local fixed = self.buffers and self.buffers[name]
        local moved = (where.dtype and t.dtype ~= where.dtype) or (where.device and t.device ~= where.device)
        if like then
            t = lc.no_grad(function() return t:detach():clone() end)
        elseif moved then
            t = lc.no_grad(function() return t:detach():to { dtype = where.dtype, device = where.device } end)
        end
        if not fixed then inst[name] = t.requires_grad and t or lc.param(t) else inst[name] = lc.keep(t) end
    end
    if like then
        for _, p in ipairs(like:parameters()) do own(p.name, p.tensor) end
        for k, v in pairs(like) do
            if inst[k] == nil and not is_param(v) then inst[k] = v end
        end
        return inst
    end
    if self.init then self.init(inst, heads, dim, where) end
    for _, p in ipairs(inst:parameters()) do own(p.name, p.tensor) end
    return inst
end

-- The file and text in which a custom map is defined, for checkpoints. A map made while a map file is being read
-- (M.from_file, M.from_source) carries that file's text; any other one is cut out of the script that holds it.
local reading

--- Declares a map: doc, init(self, heads, dim), forward(self, x, ctx); self.options holds what lc.linearize got as
--- map_options. See examples/custom_feature_map.lua.
function M.feature_map(def)
    if type(def) ~= "table" or type(def.forward) ~= "function" then
        lc.fail("lc.feature_map wants a table with a function `forward` (and usually `init` and `doc`)")
    end
    for k in pairs(def) do
        if type(k) ~= "string" then lc.fail("lc.feature_map: unexpected entry %s", tostring(k)) end
    end
    local map = setmetatable({}, Map)
    for k, v in pairs(def) do map[k] = v end
    map.meta = instance_meta(map)
    map.meta.map = map
    map.custom = def.custom ~= false
    if map.custom then
        local info = debug.getinfo(def.forward, "S")
        map.defined_in = info.source:match "^@(.*)"
        map.defined_at = info.linedefined
        map.source = reading
        map.name = def.name or (map.defined_in and map.defined_in:match "([^/]+)%.lua$") or "custom"
    end
    return map
end

function M.is_map(v) return type(v) == "table" and getmetatable(v) == Map end

-- ---- built-in maps: a learned kernel, then an activation ------------------------------------------------------------
-- Maps that do not change when all inputs of a row shift alike. The bias is one number a head, so it cancels in them:
-- it stays a parameter, for checkpoints have it, but is left out of the arithmetic, and its gradient is exactly 0
-- instead of rounding noise.
local shift_free = { softmax_dim = true, exp_dim = true }
local FEATURE_EPS = activations.FEATURE_EPS

local function builtin_init(self, heads, dim, where)
    local map = getmetatable(self).map
    local f = kernels.outputs(map, dim)
    local opts = { dtype = where.dtype, device = where.device }
    kernels.init(self, map, heads, dim, f, opts)
    if map.row.init then map.row.init(self, map, heads, f, opts, dim) end
end

--- The bias that takes part in the arithmetic, or nil.
function Instance.effective_bias(self)
    local map = getmetatable(self).map
    if shift_free[map.op] and map.with_bias ~= "feature" then return nil end
    return rawget(self, "bias")
end

--- The kernel [heads, d, f] as the fused op takes it; one that all heads share is repeated without a copy.
function Instance.weights(self, heads)
    local w = self.layer
    if w:size(1) == heads then return w end
    return w:expand(heads, w:size(2), w:size(3))
end

local function builtin_forward(self, x, ctx)
    local map = getmetatable(self).map
    return map.row.forward(kernels.apply(self, map, x), self, map, ctx, x)
end

--- Names of the built-in maps, sorted.
function M.names()
    local out = {}
    for k in pairs(activations.rows) do out[#out + 1] = k end
    table.sort(out)
    return out
end

--- A built-in map by name with its options: feature_dim, full, bias (true: one number a head; "feature": one a
--- feature), skip, init ("identity", "zero", "kaiming", "normal"), kernel ("untied", "tied", "adapter", "none"),
--- hidden_dim (of the adapter), feature_eps (no feature is smaller: 1e-12).
function M.builtin(name, opts)
    local row = activations.rows[name]
    if not row then
        lc.fail("there is no feature map '%s'; built in: %s; or give a map made by lc.feature_map, or a file that " ..
                "returns one", tostring(name), table.concat(M.names(), ", "))
    end
    opts = opts or {}
    local function pick(key, default)
        if opts[key] ~= nil then return opts[key] end
        if row[key] ~= nil then return row[key] end
        return default
    end
    local kernel = kernels.name(pick("kernel", "untied"), name)
    local bias = pick("bias", false)
    -- the fused op knows the reference's activations over one matrix a head with one bias a head
    local fused = row.op and (kernel == "untied" or (kernel == "tied" and not bias)) and bias ~= "feature"
    return M.feature_map {
        custom = false, name = name, doc = row.doc, row = row, op = row.op, fused = fused or false, half = row.half,
        few = row.few,
        signed = row.signed, buffers = row.buffers, kernel = kernel, hidden_dim = opts.hidden_dim,
        full = pick("full", true), with_bias = bias, skip = pick("skip", false),
        feature_dim = opts.feature_dim, start = opts.init or "identity",
        init = builtin_init, forward = builtin_forward, feature_eps = opts.feature_eps or FEATURE_EPS,
    }
end

--- Features that the op makes of f learned outputs.
function M.width(map, f) return (map.row and map.row.doubles and map.full) and 2 * f or f end

-- ---- maps in files --------------------------------------------------------------------------------------------------
--- Runs the text of a map file, which must return what lc.feature_map returned.
function M.from_source(text, where)
    local chunk, err = loadstring(text, "@" .. where)
    if not chunk then lc.fail("feature map: %s", err) end
    local before = reading
    reading = text
    local ok, map = pcall(chunk)
    reading = before
    if not ok then error(map, 0) end
    if not M.is_map(map) then
        lc.fail("%s must return lc.feature_map{...}; it returned a %s", where, type(map))
    end
    map.name = map.name == "custom" and (where:match "([^/]+)%.lua$" or "custom") or map.name
    return map
end

function M.from_file(path) return M.from_source(files.read(path), path) end

--- A map from what `map =` of lc.linearize may be: a map, a built-in name, or the path of a map file.
function M.resolve(map, opts)
    if map == nil then map = "hedgehog" end
    if M.is_map(map) then return map end
    if type(map) ~= "string" then
        lc.fail("map: expected a name, a file or lc.feature_map{...}, got a %s", type(map))
    end
    if map:match "%.lua$" then return M.from_file(map) end
    return M.builtin(map, opts)
end

-- Where the brackets opened at `from` close again; strings and comments are stepped over.
local function closing(text, from)
    local depth, i = 0, from
    while i <= #text do
        local c = text:sub(i, i)
        if c == "-" and text:sub(i, i + 1) == "--" then
            local eq = text:match("^%-%-%[(=*)%[", i)
            local _, stop = text:find(eq and ("]" .. eq .. "]") or "\n", i, true)
            i = stop or #text
        elseif c == "[" and text:match("^%[=*%[", i) then
            local eq = text:match("^%[(=*)%[", i)
            local _, stop = text:find("]" .. eq .. "]", i, true)
            i = stop or #text
        elseif c == "'" or c == '"' then
            i = i + 1
            while i <= #text and text:sub(i, i) ~= c do
                if text:sub(i, i) == "\\" then i = i + 1 end
                i = i + 1
            end
        elseif c:match "[%(%{%[]" then
            depth = depth + 1
        elseif c:match "[%)%}%]]" then
            depth = depth - 1
            if depth == 0 then return i end
        end
        i = i + 1
    end
end

local function line_start(text, line)
    local at = 1
    for _ = 2, line do
        at = (text:find("\n", at, true) or #text) + 1
    end
    return at
end

-- Names of a function's upvalues other than the library: what its text alone would miss.
local function outside_names(f)
    local out = {}
    for i = 1, 60 do
        local name = debug.getupvalue(f, i)
        if not name then break end
        if name ~= "lc" then out[#out + 1] = name end
    end
    return out
end

--- The text of a custom map for a checkpoint, or nil and the reason why there is none.
function M.source_of(map)
    if not map.custom then return nil, "built in" end
    if map.source then return map.source end
    if not map.defined_in then return nil, "its functions come from no file" end
    local ok, text = pcall(files.read, map.defined_in)
    if not ok then return nil, "cannot read " .. map.defined_in end
    for _, f in ipairs { map.forward, map.init } do
        local names = outside_names(f)
        if #names > 0 then
            return nil, ("it uses '%s' from outside lc.feature_map{...}; put the map into a file of its own that " ..
                         "ends with `return lc.feature_map{...}`"):format(table.concat(names, "', '"))
        end
    end
    local first = line_start(text, map.defined_at)
    local at, from = nil, 1
    while true do
        local s, e = text:find("feature_map%s*%(?%s*{", from)
        if not s or s > first + 200 then break end
        at, from = { s, e }, e + 1
    end
    if not at then return nil, "its lc.feature_map{...} was not found in " .. map.defined_in end
    local open = text:find("{", at[1], true)
    local stop = closing(text, open)
    if not stop then return nil, "its lc.feature_map{...} does not close in " .. map.defined_in end
    local cut = 'local lc = require "lolcats"\nreturn lc.feature_map ' .. text:sub(open, stop) .. "\n"
    if not loadstring(cut) then return nil, "its text could not be cut out of " .. map.defined_in end
    return cut
end

--- lc.check: see map_check.lua.
function M.check(map, opts) return require("lolcats.map_check").check(map, opts) end

M.FEATURE_EPS = FEATURE_EPS
return M
