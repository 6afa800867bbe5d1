-- model.lua: tiny whole models: softmax logits and hidden states; and for each student the transfer loss and its
-- gradients, ten AdamW steps, student logits, ten LoRA steps, and logits of a decode after a prefill.
local lc = require "lolcats"
local files = require "lolcats.files"
local nn = require "lolcats.nn"

local function int_rows(t) return t:totable() end

local function softmax_case(c, folder, dtype, tol, T)
    local t = T.tensors(folder .. "/softmax.safetensors")
    local model = lc.load(folder, { dtype = dtype })
    local hidden, ids = {}, int_rows(t.ids)
    local x = lc.no_grad(function() return model:forward(ids, { hidden = hidden }) end)
    c.close("logits", model:lm_head(x), t.logits, tol.out, tol.floor)
    for i, h in ipairs(hidden) do
        local want = t["hidden." .. (i - 1)]
        if want then c.close("hidden." .. (i - 1), h, want, tol.out, tol.floor) end
    end
    c.close("loss", lc.no_grad(function() return (model:loss(ids, int_rows(t.labels))) end), t.loss, tol.loss,
            tol.floor)
end

local function make_student(folder, s, dtype, noise)
    local teacher = lc.load(folder, { dtype = dtype })
    if noise then
        lc.no_grad(function()
            for _, p in ipairs(teacher:params()) do p.tensor:copy_(noise(p.tensor)) end
        end)
    end
    local value = function(v) if v ~= files.null then return v end end
    return lc.linearize(teacher, {
        map = s.map, kind = s.type, window = value(s.window), full = s.fullspace, feature_dim = value(s.f),
        bias = s.bias,
        affine = value(s.affine),
    })
end

local function set_params(student, t, prefix, noise)
    lc.no_grad(function()
        for _, p in ipairs(student:map_params()) do
            local x = t[prefix .. p.name]
            p.tensor:detach():copy_(noise and noise(x:to "f64") or x)
        end
    end)
end

local function adamw(flat, lr)
    flat.step = flat.step + 1
    lc.adamw_(flat.data, flat.grad, flat.m, flat.v, lr, flat.step, { weight_decay = 0 })
    flat:zero_grad()
end

local function transfer_stage(c, student, t, ids, tol, noise)
    set_params(student, t, "init.", noise)
    local loss = student:transfer(ids, { mse = 1000, xent = 1 })
    c.close("transfer loss with both terms", loss, t["transfer.loss_mse1000_xent1"], tol.loss, tol.floor)
    for _, p in ipairs(student:map_params()) do
        c.close("gradient of " .. p.name, p.tensor.grad, t["transfer.grad." .. p.name], tol.grad, tol.floor)
        p.tensor:zero_grad()
    end
    local flat, losses = nn.flatten(student:trainable()), {}
    for step = 1, t["transfer.losses"]:numel() do
        losses[step] = 0
        for _, row in ipairs(ids) do
            losses[step] = losses[step] + student:transfer({ row }, { scale = 1 / #ids })
        end
        adamw(flat, 1e-2)
    end
    c.close("transfer.losses", lc.tensor(losses, { dtype = "f64" }), t["transfer.losses"], tol.loss, tol.floor)
    for _, p in ipairs(student:map_params()) do
        c.close("transferred " .. p.name, p.tensor, t["transferred." .. p.name], tol.final, tol.floor)
    end
end

local function student_stage(c, student, t, ids, labels, tol, noise)
    -- from here on with the golden maps, so that what follows does not inherit the trajectory's rounding
    set_params(student, t, "transferred.", noise)
    student:use_linear()
    c.close("student.logits", lc.no_grad(function() return student:logits(ids) end), t["student.logits"], tol.out,
            tol.floor)
    c.close("student.loss", lc.no_grad(function() return (student:loss(ids, labels)) end), t["student.loss"], tol.loss,
            tol.floor)
end

local function lora_stage(c, student, t, ids, labels, tol, noise)
    local rank
    for name, x in pairs(t) do
        if name:match "^lora%.init%..*lora_A$" then rank = x:size(1) end
    end
    student:add_lora { rank = rank, alpha = 2 * rank }
    local list = require("lolcats.lora").parameters(student)
    local function key(name) return (name:gsub("^base_model%.model%.", ""):gsub("%.weight$", "")) end
    lc.no_grad(function()
        for _, p in ipairs(list) do
            local x = t["lora.init." .. key(p.name)]
            p.tensor:detach():copy_(noise and noise(x:to "f64") or x)
        end
    end)
    local flat, losses = nn.flatten(student:trainable()), {}
    for step = 1, t["lora.losses"]:numel() do
        losses[step] = lc.scope(function()
            local loss = student:loss(ids, labels)
            loss:backward()
            return loss:item()
        end)
        if step == 2 then
            for _, p in ipairs(list) do
                c.close("gradient at step 2 of " .. p.name, p.tensor.grad, t["lora.grad_at_step2." .. key(p.name)],
                        tol.grad, tol.floor)
            end
        end
        adamw(flat, 1e-2)
    end
    c.close("lora.losses", lc.tensor(losses, { dtype = "f64" }), t["lora.losses"], tol.loss, tol.floor)
    for _, p in ipairs(list) do
        c.close("final " .. p.name, p.tensor, t["lora.final." .. key(p.name)], tol.final, tol.floor)
    end
    lc.no_grad(function() -- decode continues from the golden end, not from ours
        for _, p in ipairs(list) do p.tensor:detach():copy_(t["lora.final." .. key(p.name)]) end
    end)
end

-- Prefill, then token by token; and the whole text in odd chunks.
local function decode_stage(c, student, t, prefill, tol)
    local all = int_rows(t["decode.ids"])[1]
    local whole = lc.no_grad(function() return student:logits { all } end)
    c.close("logits of the longer text", whole, t["decode.logits"], tol.out, tol.floor)
    local function pieces(label, sizes)
        local state, at, rows = student:new_state(1), 1, {}
        for _, n in ipairs(sizes) do
            local part = {}
            for i = at, at + n - 1 do part[#part + 1] = all[i] end
            rows[#rows + 1] = lc.no_grad(function()
                return student:lm_head(student:forward({ part }, { state = state }))
            end)
            at = at + n
        end
        c.close(label, lc.cat(rows, 2), t["decode.logits"], tol.out, tol.floor)
        student:drop_state(state)
    end
    local one = { prefill }
    for _ = prefill + 1, #all do one[#one + 1] = 1 end
    pieces("decode after a prefill", one)
    local odd, left, n = {}, #all, 1
    while left > 0 do
        odd[#odd + 1] = math.min(n, left)
        left = left - odd[#odd]
        n = n % 11 + 2
    end
    pieces("prefill in odd chunks", odd)
    student:plain(pieces, "decode by the plain twin", one)
end

return function(dir, T)
    local students = files.read_json(dir .. "/students.json")
    local names = {}
    for name in pairs(students) do names[#names + 1] = name end
    table.sort(names)
    for _, model in ipairs(files.list(dir)) do
        local folder = dir .. "/" .. model
        if files.is_dir(folder) and files.exists(folder .. "/config.json") then
            for _, dtype in ipairs(T.DTYPES) do
                T.case(("model/%s softmax %s"):format(model, dtype), function(c)
                    softmax_case(c, folder, dtype, T.TOL[dtype], T)
                end)
                for _, name in ipairs(names) do
                    local path = folder .. "/" .. name .. ".safetensors"
                    if files.exists(path) then
                        T.dtype_case(("model/%s %s"):format(model, name), dtype, function(c, kind, tol, noise)
                            local t = T.tensors(path)
                            local ids, labels = int_rows(t.ids), int_rows(t.labels)
                            local student = make_student(folder, students[name], kind, noise)
                            transfer_stage(c, student, t, ids, tol, noise)
                            student_stage(c, student, t, ids, labels, tol, noise)
                            lora_stage(c, student, t, ids, labels, tol, noise)
                            decode_stage(c, student, t, #ids[1], tol)
                        end)
                    end
                end
            end
        end
    end
end
