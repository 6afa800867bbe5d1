-- checkpoints.lua: PyTorch's, PEFT's and the reference's files: every tensor by its digest, the values beside them,
-- files that must be refused, and the logits of models with such files loaded.
local lc = require "lolcats"
local files = require "lolcats.files"
local ffi = require "ffi"

local function sorted(t)
    local out = {}
    for k in pairs(t) do out[#out + 1] = k end
    table.sort(out)
    return out
end

local function digest(f, name)
    local info = f:info(name)
    local x = f:tensor(name, { dtype = info.dtype or "i32", device = "cpu" })
    if info.dtype then return files.sha256(ffi.string(ffi.cast("const char *", x:data()), x:nbytes())) end
    -- an integer type that no tensor has: its bytes are made again from the values
    local width, bytes = info.bytes / math.max(1, x:numel()), {}
    for i, v in ipairs(x:flatten():totable()) do
        local b = {}
        for k = 1, width do
            b[k] = string.char(v % 256)
            v = math.floor(v / 256)
        end
        bytes[i] = table.concat(b)
    end
    return files.sha256(table.concat(bytes))
end

-- Names as the index says them: a folder of an adapter may be named as PEFT's module tree or as its file has it.
local function tensors_case(c, f, want)
    local n = 0
    for name, e in pairs(want) do
        n = n + 1
        if c.check(name .. " is there", f:has(name)) then
            local info = f:info(name)
            local dtypes = { float32 = "F32", bfloat16 = "BF16", float16 = "F16", float64 = "F64" }
            c.check(name .. " dtype", info.file_dtype == e.dtype or info.file_dtype == dtypes[e.dtype],
                info.file_dtype)
            c.check(name .. " shape", table.concat(info.shape, ",") == table.concat(e.shape, ","),
                table.concat(info.shape, ","))
            c.check(name .. " values", lc.scope(digest, f, name) == e.sha256, "sha256 differs")
        end
    end
    return n
end

local function same(got, want)
    if type(want) ~= "table" or want == files.null then return got == want end
    if type(got) ~= "table" then return false end
    for k, v in pairs(want) do
        if not same(got[k], v) then return false, k end
    end
    for k in pairs(got) do
        if want[k] == nil then return false, k end
    end
    return true
end

local function file_case(c, path, want)
    local f = files.open_tensors(path)
    local n = tensors_case(c, f, want.tensors)
    local others = 0
    for _, name in ipairs(f:names()) do
        if not want.tensors[name] and not name:match "^nested_tensors%." then others = others + 1 end
    end
    c.check("no other tensors", others == 0, ("%d of them beside %d"):format(others, n))
    if want.extra then
        local extra = f:meta()
        if extra.extra then extra = extra.extra end -- the key that the file itself has
        local ok, key = same(extra, want.extra)
        c.check("values beside the tensors", ok, tostring(key))
    end
    f:close()
end

local function refuse_case(c, path, what)
    local before = lc.peak_rss()
    local ok, err = pcall(function()
        local f = files.open_tensors(path)
        for _, name in ipairs(f:names()) do lc.scope(function() f:tensor(name) end) end
        f:close()
    end)
    local text = tostring(err)
    c.check("refused", not ok, "it was read without an error")
    c.check("the message names the file", text:find(files.basename(path), 1, true), text)
    local said = type(what) == "table" and what.what or ""
    local called = said:match "calls ([%w_.]+)" or said:match "(os%.system) is called"
    if called and not ok then c.check("the message names " .. called, text:find(called, 1, true), text) end
    c.check("no large allocation", lc.peak_rss() - before < 64e6, ("%.0f MB"):format((lc.peak_rss() - before) / 1e6))
end

-- ---- logits
-- ---------------------------------------------------------------------------------------------------------
local REL = { f64 = 1e-9, f32 = 1e-4 }

-- The model that the files belong to, and its student as the index of models describes it.
local function paths_of(dir, json)
    local base = dir .. "/../" .. (tostring(json.model):match "^golden/(model/%S+)" or "model/llama_tied_gqa")
    local student = tostring(json.model):match "of ([%w_]+)%.safetensors" or "hedgehog_terrace"
    local all = files.read_json(dir .. "/../model/students.json")
    return base, all[student] or all.hedgehog_terrace
end

local function logits_of(model, ids) return lc.no_grad(function() return model:logits(ids) end) end

-- A whole model's file beside the config of another folder.
local function whole_case(c, T, dir, base, name, dtype)
    local t = T.tensors(dir .. "/expected_logits.safetensors")
    local folder = os.tmpname()
    os.remove(folder)
    files.make_dirs(folder)
    files.write(folder .. "/config.json", files.read(base .. "/config.json"))
    local bin = name:match "%.bin$"
    files.write(folder .. (bin and "/pytorch_model.bin" or "/model.safetensors"), files.read(dir .. "/" .. name))
    local ok, model = pcall(lc.load, folder, { dtype = dtype })
    for _, f in ipairs(files.list(folder)) do files.remove(folder .. "/" .. f) end
    files.remove(folder)
    if not ok then error(model, 0) end
    local key = name:match "f16" and not name:match "bf16" and "model_f16" or "model_bf16"
    c.close("logits", logits_of(model, t.ids:totable()), t["logits." .. key], REL[dtype])
end

local function student_case(c, T, dir, json, dtype, loads, key)
    local base, s = paths_of(dir, json)
    local t = T.tensors(dir .. "/expected_logits.safetensors")
    local function value(v) if v ~= files.null then return v end end
    local student = lc.linearize(lc.load(base, { dtype = dtype }), { map = s.map, kind = s.type,
        window = value(s.window),
        full = s.fullspace, feature_dim = value(s.f), bias = s.bias })
    local checkpoint = require "lolcats.reference_checkpoint"
    for _, path in ipairs(loads) do
        local rank
        for name, e in pairs(json.files[path].tensors) do
            if name:match "lora_A" then rank = e.shape[1] end
        end
        if rank and not student.lora then
            local alpha = 2 * rank
            for _, e in pairs(json.files) do alpha = tonumber(e.what:match("r " .. rank .. ", alpha (%d+)")) or
                alpha end
            student:add_lora { rank = rank, alpha = alpha }
        end
        checkpoint.load(student, dir .. "/" .. path)
    end
    student:use_linear()
    c.close("logits", logits_of(student, t.ids:totable()), t["logits." .. key], REL[dtype])
end

-- Which files together make which of the expected logits: those with the same tensors do, whatever their form and
-- names.
local function logits_cases(dir, T, json)
    if not files.exists(dir .. "/expected_logits.safetensors") then return end
    local first, second, both, blocks = {}, {}, {}, {}
    for _, name in ipairs(sorted(json.files)) do
        local maps, loras = false, false
        for tensor in pairs(json.files[name].tensors) do
            maps, loras = maps or tensor:match "window_factors$", loras or tensor:match "self_attn.*lora_A%.default"
        end
        if name:match "^blocks/.*_distill%.pt$" then blocks[#blocks + 1] = name
        elseif maps and loras then both[#both + 1] = name
        elseif loras then second[#second + 1] = name
        elseif maps and json.files[name].tensors["model.layers.0.self_attn.window_factors"].dtype == "bfloat16" then
            first[#first + 1] = name end
    end
    if #blocks > 0 then first[#first + 1] = blocks end
    for _, dtype in ipairs(T.DTYPES) do
        local function case(loads, key)
            T.case(("checkpoints/logits %s %s"):format(table.concat(loads, " + "), dtype), function(c)
                student_case(c, T, dir, json, dtype, loads, key) end)
        end
        for _, name in ipairs(first) do case(type(name) == "table" and name or { name }, "distill_bf16") end
        for _, name in ipairs(second) do case({ first[1], name }, "distill_bf16+ft_lora_bf16") end
        for _, name in ipairs(both) do case({ name }, "distill_bf16+ft_lora_bf16") end
        for _, name in ipairs { "model_bf16.safetensors", "model_f16.safetensors", "pytorch_model_bf16.bin" } do
            if json.files[name] then
                T.case(("checkpoints/logits %s %s"):format(name, dtype), function(c)
                    whole_case(c, T, dir, (paths_of(dir, json)), name, dtype) end)
            end
        end
    end
end

return function(dir, T)
    local json = files.read_json(dir .. "/index.json")
    for _, name in ipairs(sorted(json.files)) do
        T.case("checkpoints/" .. name, function(c) file_case(c, dir .. "/" .. name, json.files[name]) end)
    end
    for _, name in ipairs(sorted(json.refuse)) do
        T.case("checkpoints/refuse/" .. name, function(c)
            refuse_case(c, dir .. "/" .. name, type(json.refuse[name]) == "table" and json.refuse[name] or {})
        end)
    end
    logits_cases(dir, T, json)
    dofile(T.here .. "golden/peft.lua")(dir, T)
end
