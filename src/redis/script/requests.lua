-- Requests: what they hold, what becomes of that, and what a node may admit out of a lease.

local run = {}

-- Holds room for a request in all cells or in none. Returns how many requests are in flight, how many nodes are alive,
-- and the states before.
function run.reserve()
  local id, most, mode, generates = text(), int(), text(), int() == 1
  local ask, completions = amounts(), int()
  local names = texts(int())
  local known = redis.call('HMGET', meta_key, 's:' .. session, 'in_flight', 'alive')
  load(names)
  local in_flight = tonumber(known[2]) or 0
  if (tonumber(known[1]) or 0) <= 0 or not all_known(names) then return { UNKNOWN, now } end
  if not advance(names) then return { BOUNDS, now } end
  local reply = { FULL, now, in_flight, tonumber(known[3]) or 1 }
  for _, name in ipairs(names) do
    shown(reply, name)
    dirty[name] = true
  end
  if most == 0 or in_flight < most then
    local held = all_fit(names, ask, generates) and ask
    if not held and mode == 'clamp' and ask[COMPLETION] > 0 then held = clamped(names, ask, completions) end
    if not held and mode == 'watch' then held = ask end
    reply[1] = held and ADMITTED or DENIED
    if held then
      redis.call('HSET', own_key, id, cmsgpack.pack({ take(names, held) }))
      redis.call('HINCRBY', meta_key, 'in_flight', 1)
    end
  end
  save()
  return reply
end

-- What a node has spent of a quota while it was cut off and has not come back since; of a calendar's period only while
-- it runs.
local function pay(name, amount, turn)
  local cell = cells[name]
  if not cell or (cell.class and cell.turn ~= turn) then return end
  if cell.class then cell.used = cell.used + amount else cell.whole = cell.whole - amount end
  dirty[name] = true
end

local function lease_pieces(packed) return packed and cmsgpack.unpack(packed) or {} end

local function lease_of(packed)
  local lease = {}
  for _, piece in ipairs(lease_pieces(packed)) do lease[piece[3][1]] = piece end
  return lease
end

-- What is left of a lease in a cell; of a period that is over nothing is.
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
    redis.call('HDEL', own_key, LEASE)
  else
    redis.call('HSET', own_key, LEASE, cmsgpack.pack(pieces))
  end
end

-- A request that its node has admitted out of its lease: what it holds is taken from there, and the rest, if the lease
-- has been lost meanwhile, from the cells.
local function open(lease, names, ask)
  for _, name in ipairs(names) do
    local cell = cells[name]
    if cell then
      local amount = min(leased(lease, name), ask[cell.kind])
      set_leased(lease, name, leased(lease, name) - amount)
      cell.held = cell.held - amount
      if not cell.class then cell.whole = cell.whole + amount end
    end
  end
  return { take(names, ask) }
end

-- How often what was used of each was reset.
local function resets_of(names)
  local resets = {}
  for i, name in ipairs(names) do resets[i] = cells[name] and cells[name].resets or 0 end
  return resets
end

-- Takes back that a reservation was charged in full: its node was only cut off. Of a quota that was reset since there is
-- nothing to take back.
local function hold_again(pieces)
  for _, piece in ipairs(pieces) do
    local reserved, moved, names, turns = piece[1], piece[2], piece[3], piece[4]
    local before, resets = piece[5] or {}, resets_of(names)
    for i, name in ipairs(names) do
      local cell = cells[name]
      if cell and (not cell.class or cell.turn == turns[i]) then
        local held = max(reserved[cell.kind] - moved[cell.kind], 0)
        local is_charged = (before[i] or 0) == resets[i]
        cell.held = cell.held + held
        if not cell.class then
          if not is_charged then cell.whole = cell.whole - held end
          cap(cell)
        elseif is_charged then
          cell.used = max(cell.used - held, 0)
        end
        dirty[name] = true
      end
    end
  end
end

-- The steps of a call that were not applied yet, and the number of its last one.
local function new_steps(applied)
  local first, count, steps = int(), int(), {}
  for i = 0, count - 1 do
    local step = { what = text(), id = text(), amounts = amounts() }
    if step.what == 'open' then step.names = texts(int()) end
    if first + i > applied then steps[#steps + 1] = step end
  end
  return steps, first + count - 1
end

-- The reservations that steps are about, and which of these were charged: such a step comes late, before its node has said
-- that it still holds them.
local function find_all(steps)
  local reservations, charged = {}, {}
  for _, step in ipairs(steps) do
    local id = step.id
    if step.what ~= 'pay' and not reservations[id] then
      local packed = redis.call('HGET', own_key, id)
      if not packed and id ~= LEASE then
        packed = redis.call('HGET', charged_key(session), id)
        charged[id] = packed or nil
      end
      reservations[id] = packed and cmsgpack.unpack(packed) or nil
    end
  end
  return reservations, charged
end

-- Loads all cells that steps change, beside those of reservations; returns their names.
local function load_changed(steps, reservations)
  local names = names_of(reservations)
  for _, step in ipairs(steps) do
    if step.what == 'pay' then names[#names + 1] = step.id end
    for _, name in ipairs(step.names or {}) do names[#names + 1] = name end
  end
  load(names)
  return names
end

-- What has become of reservations, in order. What was applied already is not applied again. Returns how many steps were, and
-- how the cells stand that the node asks for.
function run.apply()
  local known = redis.call('HMGET', meta_key, 's:' .. session, 'q:' .. session)
  -- Of a session that is over, or was lost, a step would find nothing and be forgotten.
  if (tonumber(known[1]) or 0) <= 0 then return { UNKNOWN, now } end
  local applied = tonumber(known[2]) or 0
  local steps, last = new_steps(applied)
  local asked_for = texts(int())
  local reservations, charged = find_all(steps)
  local names = load_changed(steps, reservations)
  load(asked_for)
  if not all_known(asked_for) then return { UNKNOWN, now } end
  if not advance(names) or not advance(asked_for) then return { BOUNDS, now } end
  local gone, lease = 0, nil
  for id in pairs(charged) do
    hold_again(reservations[id])
    redis.call('HDEL', charged_key(session), id)
    gone = gone - 1
  end
  for _, step in ipairs(steps) do
    local id, what = step.id, step.what
    local pieces = reservations[id]
    if what == 'pay' then
      pay(id, step.amounts[1], step.amounts[2])
    elseif what == 'open' then
      lease = lease or lease_of(redis.call('HGET', own_key, LEASE))
      if not pieces then
        reservations[id] = open(lease, step.names, step.amounts)
        gone = gone - 1
      end
    elseif id == LEASE then
      for _, piece in pairs(lease or pieces or {}) do settle_piece(piece, { 0, 0, 0, 0 }) end
      reservations[id], lease = nil, lease and {}
      redis.call('HDEL', own_key, id)
    elseif pieces and what == 'settle' then
      settle(pieces, step.amounts)
      reservations[id] = nil
      redis.call('HDEL', own_key, id)
      gone = gone + 1
    elseif pieces then
      if what == 'extend' then extend(pieces, step.amounts) else progress(pieces, step.amounts) end
    end
  end
  for id, pieces in pairs(reservations) do redis.call('HSET', own_key, id, cmsgpack.pack(pieces)) end
  if lease then save_lease(lease) end
  if gone ~= 0 then redis.call('HINCRBY', meta_key, 'in_flight', -gone) end
  redis.call('HSET', meta_key, 'q:' .. session, max(applied, last))
  save()
  local reply = { DONE, now, #steps }
  for _, name in ipairs(asked_for) do shown(reply, name) end
  return reply
end

-- A node wants so much of each cell to admit requests out of. A tenth of each is never leased. Returns how much it has
-- got of each, beside what it had.
function run.lease()
  local names, wanted = {}, {}
  for i = 1, int() do names[i], wanted[i] = text(), int() end
  load(names)
  if not is_known() or not all_known(names) then return { UNKNOWN, now } end
  if not advance(names) then return { BOUNDS, now } end
  local lease = lease_of(redis.call('HGET', own_key, LEASE))
  local reply = { DONE, now }
  for i, name in ipairs(names) do
    local cell, has = cells[name], leased(lease, name)
    local left = cell.class and cell.limit - cell.used - cell.held or cell.whole
    local kept = floor((cell.class and cell.limit or cell.burst) / 10)
    local more = max(min(wanted[i] - has, left - kept), 0)
    cell.held = cell.held + more
    if not cell.class then cell.whole = cell.whole - more end
    set_leased(lease, name, has + more)
    dirty[name] = true
    reply[#reply + 1] = more
  end
  save_lease(lease)
  save()
  for _, name in ipairs(names) do shown(reply, name) end
  return reply
end
