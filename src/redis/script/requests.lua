-- Commands for requests: they reserve, extend, progress and settle, and they lease tokens to a node.

-- The commands by name.
local commands = {}

-- Reserves amounts for a request in all of these cells or in none. Replies with the number of requests in flight, the
-- number of nodes alive, and the states of the cells before the reservation.
function commands.reserve()
  local id, max_in_flight, mode, generates = read_text(), read_int(), read_text(), read_int() == 1
  local amounts, completions = read_amounts(), read_int()
  local names = read_texts(read_int())
  local meta = redis.call('HMGET', meta_key, 's:' .. session, 'in_flight', 'alive')
  load_cells(names)
  local in_flight = tonumber(meta[2]) or 0
  if (tonumber(meta[1]) or 0) <= 0 or not all_exist(names) then return { UNKNOWN_SESSION, now } end
  if not advance_to_now(names) then return { STALE_PERIOD, now } end
  local reply = { TOO_MANY_IN_FLIGHT, now, in_flight, tonumber(meta[3]) or 1 }
  for _, name in ipairs(names) do
    append_state(reply, name)
    is_changed[name] = true
  end
  if max_in_flight == 0 or in_flight < max_in_flight then
    local held = all_fit(names, amounts, generates) and amounts
    if not held and mode == 'clamp' and amounts[COMPLETION] > 0 then held = clamp(names, amounts, completions) end
    if not held and mode == 'watch' then held = amounts end
    reply[1] = held and ADMITTED or DENIED
    if held then
      redis.call('HSET', reservations_key, id, cmsgpack.pack({ hold_amounts(names, held) }))
      redis.call('HINCRBY', meta_key, 'in_flight', 1)
    end
  end
  save_cells()
  return reply
end

-- Reserves amounts for a request in all of these cells of an environment and of its upstream, or in none. In the mode
-- 'watch' only those of the upstream must have room. The session has the same name in both. Replies with the number of
-- requests in flight and of nodes alive, for the environment and for the upstream, and the states of all cells before
-- the reservation. After UNKNOWN_SESSION: 1 if the environment does not know the session, 2 if the upstream does not.
function commands.reserve_at()
  local id, max_in_flight, mode, generates = read_text(), read_int(), read_text(), read_int() == 1
  local amounts, completions = read_amounts(), read_int()
  local names = read_texts(read_int())
  local upstream_id, upstream_max = read_text(), read_int()
  local upstream_names = read_texts(read_int())
  for _ = 1, read_int() do
    local class, start = read_text(), read_int()
    period_bounds[class] = { start, read_int() }
  end
  local meta = redis.call('HMGET', meta_key, 's:' .. session, 'in_flight', 'alive')
  local upstream_meta = redis.call('HMGET', KEYS[5], 's:' .. session, 'in_flight', 'alive')
  load_cells(names)
  load_cells(upstream_names, upstream_cells_key)
  local in_flight, upstream_in_flight = tonumber(meta[2]) or 0, tonumber(upstream_meta[2]) or 0
  if (tonumber(meta[1]) or 0) <= 0 or not all_exist(names) then return { UNKNOWN_SESSION, now, 1 } end
  if (tonumber(upstream_meta[1]) or 0) <= 0 or not all_exist(upstream_names) then
    return { UNKNOWN_SESSION, now, 2 }
  end
  if not advance_to_now(names) or not advance_to_now(upstream_names) then return { STALE_PERIOD, now } end
  local reply = {
    TOO_MANY_IN_FLIGHT, now, in_flight, tonumber(meta[3]) or 1, upstream_in_flight, tonumber(upstream_meta[3]) or 1,
  }
  local all = {}
  for _, name in ipairs(names) do all[#all + 1] = name end
  for _, name in ipairs(upstream_names) do
    all[#all + 1] = name
    is_of_upstream[name] = true
  end
  for _, name in ipairs(all) do
    append_state(reply, name)
    is_changed[name] = true
  end
  local is_full = max_in_flight > 0 and in_flight >= max_in_flight
  if not is_full and (upstream_max == 0 or upstream_in_flight < upstream_max) then
    local held = all_fit(mode == 'watch' and upstream_names or all, amounts, generates) and amounts
    if not held and mode == 'clamp' and amounts[COMPLETION] > 0 then held = clamp(all, amounts, completions) end
    reply[1] = held and ADMITTED or DENIED
    if held then
      redis.call('HSET', reservations_key, id, cmsgpack.pack({ hold_amounts(names, held) }))
      redis.call('HINCRBY', meta_key, 'in_flight', 1)
      redis.call('HSET', KEYS[6], upstream_id, cmsgpack.pack({ hold_amounts(upstream_names, held) }))
      redis.call('HINCRBY', KEYS[5], 'in_flight', 1)
    end
  end
  save_cells()
  return reply
end

-- Charges tokens that a node spent while it was offline, or in a quota that was unlimited. A calendar quota, or the
-- clock's period of an unlimited one, is charged only if the period is still the same.
local function charge_offline_usage(name, amount, turn)
  local cell = cells[name]
  if not cell or (cell.class and cell.turn ~= turn) then return end
  is_changed[name] = true
  if cell.class then
    cell.used = cell.used + amount
    return
  end
  if turn == 0 or turn == cell.since then count(cell, amount) end
  if cell.limit ~= 0 then cell.whole = cell.whole - amount end
end

-- A lease is stored like a reservation, with one piece for each cell.
local function unpack_pieces(packed) return packed and cmsgpack.unpack(packed) or {} end

-- The pieces of a lease by the name of their cell.
local function read_lease(packed)
  local lease = {}
  for _, piece in ipairs(unpack_pieces(packed)) do lease[piece[3][1]] = piece end
  return lease
end

-- The leased tokens of a cell that are not used yet. A lease expires with the calendar period.
local function leased(lease, name)
  local piece, cell = lease[name], cells[name]
  if not piece or not cell or (cell.class and piece[4][1] ~= cell.turn) then return 0 end
  return piece[1][cell.kind]
end

local function set_leased(lease, name, amount)
  local cell = cells[name]
  local reserved = { 0, 0, 0, 0 }
  reserved[cell.kind] = amount
  lease[name] = { reserved, { 0, 0, 0, 0 }, { name }, { cell.class and cell.turn or 0 } }
end

local function save_lease(lease)
  local pieces = {}
  for _, piece in pairs(lease) do pieces[#pieces + 1] = piece end
  if #pieces == 0 then
    redis.call('HDEL', reservations_key, LEASE)
  else
    redis.call('HSET', reservations_key, LEASE, cmsgpack.pack(pieces))
  end
end

-- Creates the reservation of a request that a node admitted from its lease. Takes its amounts from the lease. If the
-- lease has too little, for example because the server lost it, takes the rest from the cells.
local function open_leased(lease, names, amounts)
  for _, name in ipairs(names) do
    local cell = cells[name]
    if cell then
      local amount = min(leased(lease, name), amounts[cell.kind])
      set_leased(lease, name, leased(lease, name) - amount)
      cell.held = cell.held - amount
      if not cell.class then cell.whole = cell.whole + amount end
    end
  end
  return { hold_amounts(names, amounts) }
end

-- The number of times that an administrator has reset each cell.
local function reset_counts(names)
  local resets = {}
  for i, name in ipairs(names) do resets[i] = cells[name] and cells[name].resets or 0 end
  return resets
end

-- Holds a reservation again that was charged in full, and reverses the charge: its node was only cut off. If a quota
-- was reset after the charge, the reset has already removed it.
local function hold_again(pieces)
  for _, piece in ipairs(pieces) do
    local reserved, moved, names, turns = piece[1], piece[2], piece[3], piece[4]
    local before, resets = piece[5] or {}, reset_counts(names)
    for i, name in ipairs(names) do
      local cell = cells[name]
      if cell and (not cell.class or cell.turn == turns[i]) then
        local held = max(reserved[cell.kind] - moved[cell.kind], 0)
        local is_charged = (before[i] or 0) == resets[i]
        cell.held = cell.held + held
        if not cell.class then
          if is_charged then count(cell, -held) else cell.whole = cell.whole - held end
          cap_level(cell)
        elseif is_charged then
          cell.used = max(cell.used - held, 0)
        end
        is_changed[name] = true
      end
    end
  end
end

-- Reads the steps of a call. Returns the steps that were not applied before, the number of the last step, and
-- whether steps are missing between the applied ones and these.
local function read_new_steps(applied)
  local first, count, steps = read_int(), read_int(), {}
  for i = 0, count - 1 do
    local step = { what = read_text(), id = read_text(), amounts = read_amounts() }
    if step.what == 'open' then step.names = read_texts(read_int()) end
    if first + i > applied then steps[#steps + 1] = step end
  end
  return steps, first + count - 1, first > applied + 1
end

-- Loads the reservations that steps refer to. The second result contains the reservations that were charged in full:
-- their session ended before the step arrived, and the node has not yet listed them with `hold`.
local function find_reservations(steps)
  local reservations, charged = {}, {}
  for _, step in ipairs(steps) do
    local id = step.id
    if step.what ~= 'pay' and not reservations[id] then
      local packed = redis.call('HGET', reservations_key, id)
      if not packed and id ~= LEASE then
        packed = redis.call('HGET', charged_key_of(session), id)
        charged[id] = packed or nil
      end
      reservations[id] = packed and cmsgpack.unpack(packed) or nil
    end
  end
  return reservations, charged
end

-- Loads all cells that steps or reservations refer to. Returns their names.
local function load_changed_cells(steps, reservations)
  local names = cell_names(reservations)
  for _, step in ipairs(steps) do
    if step.what == 'pay' then names[#names + 1] = step.id end
    for _, name in ipairs(step.names or {}) do names[#names + 1] = name end
  end
  load_cells(names)
  return names
end

-- Applies steps of reservations in order. Steps that were applied before are skipped. Replies with the number of
-- steps applied and the states of the requested cells.
function commands.apply()
  local meta = redis.call('HMGET', meta_key, 's:' .. session, 'q:' .. session)
  -- If the session has ended or was lost, a step would not find its reservation and would have no effect.
  if (tonumber(meta[1]) or 0) <= 0 then return { UNKNOWN_SESSION, now } end
  local applied = tonumber(meta[2]) or 0
  local steps, last, has_gap = read_new_steps(applied)
  -- The server has lost steps that it had acknowledged. The node repeats them after it has joined again.
  if has_gap then return { UNKNOWN_SESSION, now } end
  local requested = read_texts(read_int())
  local reservations, charged = find_reservations(steps)
  local names = load_changed_cells(steps, reservations)
  load_cells(requested)
  if not all_exist(requested) then return { UNKNOWN_SESSION, now } end
  if not advance_to_now(names) or not advance_to_now(requested) then return { STALE_PERIOD, now } end
  local ended, lease = 0, nil
  for id in pairs(charged) do
    hold_again(reservations[id])
    redis.call('HDEL', charged_key_of(session), id)
    ended = ended - 1
  end
  for _, step in ipairs(steps) do
    local id, what = step.id, step.what
    local pieces = reservations[id]
    if what == 'pay' then
      charge_offline_usage(id, step.amounts[1], step.amounts[2])
    elseif what == 'open' then
      lease = lease or read_lease(redis.call('HGET', reservations_key, LEASE))
      if not pieces then
        reservations[id] = open_leased(lease, step.names, step.amounts)
        ended = ended - 1
      end
    elseif id == LEASE then
      for _, piece in pairs(lease or pieces or {}) do settle_piece(piece, { 0, 0, 0, 0 }) end
      reservations[id], lease = nil, lease and {}
      redis.call('HDEL', reservations_key, id)
    elseif pieces and what == 'settle' then
      settle(pieces, step.amounts)
      reservations[id] = nil
      redis.call('HDEL', reservations_key, id)
      ended = ended + 1
    elseif pieces then
      if what == 'extend' then extend(pieces, step.amounts) else progress(pieces, step.amounts) end
    end
  end
  for id, pieces in pairs(reservations) do redis.call('HSET', reservations_key, id, cmsgpack.pack(pieces)) end
  if lease then save_lease(lease) end
  if ended ~= 0 then redis.call('HINCRBY', meta_key, 'in_flight', -ended) end
  redis.call('HSET', meta_key, 'q:' .. session, max(applied, last))
  save_cells()
  local reply = { DONE, now, #steps }
  for _, name in ipairs(requested) do append_state(reply, name) end
  return reply
end

-- Leases tokens of each cell to a node, which admits requests from them. `wanted` includes tokens leased before. A
-- tenth of each quota is never leased. Replies with the additional tokens of each cell, and the states of the cells.
function commands.lease()
  local names, wanted = {}, {}
  for i = 1, read_int() do names[i], wanted[i] = read_text(), read_int() end
  load_cells(names)
  if not is_session_open() or not all_exist(names) then return { UNKNOWN_SESSION, now } end
  if not advance_to_now(names) then return { STALE_PERIOD, now } end
  local lease = read_lease(redis.call('HGET', reservations_key, LEASE))
  local reply = { DONE, now }
  for i, name in ipairs(names) do
    local cell, old = cells[name], leased(lease, name)
    local left = cell.class and cell.limit - cell.used - cell.held or cell.whole
    local not_leased = floor((cell.class and cell.limit or cell.burst) / 10)
    local more = cell.limit == 0 and 0 or max(min(wanted[i] - old, left - not_leased), 0)
    cell.held = cell.held + more
    if not cell.class then cell.whole = cell.whole - more end
    set_leased(lease, name, old + more)
    is_changed[name] = true
    reply[#reply + 1] = more
  end
  save_lease(lease)
  save_cells()
  for _, name in ipairs(names) do append_state(reply, name) end
  return reply
end
