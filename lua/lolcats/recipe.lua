-- recipe.lua: what recipes share. lc.recipe("distill"): one recipe as a function for another, which calls it with its
-- own defaults. The file is run with the word "recipe" as its argument and returns the function. It is looked for
-- beside the script, then among the program's recipes; its text goes into the run folder too. And the arguments that
-- say what a student's attentions are like.
local lc = require "lolcats"
local files = require "lolcats.files"
local cli = require "lolcats.cli"
local program = require "lolcats.program"

local M = {}

local function find(name)
    local script = cli.script
    local beside = script and script.file and script.file:match "^(.*)/[^/]*$"
    if beside and files.is_file(beside .. "/" .. name .. ".lua") then
        local path = beside .. "/" .. name .. ".lua"
        return files.read(path), path
    end
    local path = "recipes/" .. name .. ".lua"
    return program.source(path), path
end

function M.load(name)
    local text, path = find(name)
    if not text then lc.fail("there is no recipe '%s'", tostring(name)) end
    local chunk, why = loadstring(text, "@" .. path)
    if not chunk then lc.fail("%s", why) end
    local f = chunk "recipe"
    if type(f) ~= "function" then lc.fail("%s is no recipe for others: it returned no function", path) end
    if cli.script then
        cli.script.parts = cli.script.parts or {}
        table.insert(cli.script.parts, { name = name .. ".lua", text = text })
    end
    return f
end

-- ---- arguments of a student -----------------------------------------------------------------------------------------
--- Rows of lc.args for what a student's attentions are like; d: a recipe's defaults. M.student reads them.
function M.student_rows(d)
    return {
        { "map", d.map or "hedgehog", "feature map: a built-in name, or a .lua file" },
        { "feature_dim", d.feature_dim or 0, "learned features a head; 0: the map's own", min = 0 },
        { "bias", d.bias or false, "feature maps with a bias" },
        { "kernel", d.kernel or "own", "what the maps learn: a matrix a head, one for all heads, a small network, " ..
          "nothing; own: as the map has it", { "own", "untied", "tied", "adapter", "none" } },
        { "init", d.init or "identity", "how those weights start", { "identity", "kaiming", "normal" } },
        { "tie_qk", d.tie_qk or false, "one map for queries and keys" },
        { "window", d.window or 64, "tokens that keep softmax attention", min = 0 },
        { "kind", d.kind or "terrace", "how the window moves", { "terrace", "sliding", "linear" } },
        { "window_factor", d.window_factor or -2.1972245773362196,
          "where the window's weight g starts, before its sigmoid" },
        { "affine", d.affine or false, "weights g and 1 - g of window and linear part, not g and 1; with " ..
          "--window_factor 4 it starts as the window alone" },
        { "sinks", d.sinks or 0, "first tokens that every query keeps in its window", min = 0 },
        { "softmax_layers", d.softmax_layers or {},
          "layers that keep softmax: positions from 1, negative from the end" },
    }
end

--- lc.linearize's options from such arguments.
function M.student(args)
    local layers = {}
    for i, v in ipairs(args.softmax_layers) do
        layers[i] = tonumber(v) or cli.usage("--softmax-layers: '%s' is no position of a layer", tostring(v))
    end
    local linear = args.kind == "linear" or args.window == 0
    return {
        map = args.map, feature_dim = args.feature_dim > 0 and args.feature_dim or nil, bias = args.bias or nil,
        kernel = args.kernel ~= "own" and args.kernel or nil, init = args.init ~= "identity" and args.init or nil,
        tie_qk = args.tie_qk or nil, window = linear and 0 or args.window, kind = linear and "linear" or args.kind,
        window_factor = args.window_factor, affine = args.affine or nil, sinks = args.sinks > 0 and args.sinks or nil,
        softmax_layers = #layers > 0 and layers or nil,
    }
end

return M
