-- Sessions of nodes: they take part, are alive, leave or die.

-- A cell as a node gives it: kind, class (empty: it rolls), period, limit, burst, whose limit, and what is left of it
-- when nothing is held: level and fraction, or what was used and in which turn. Beside it, limit and burst of its config.
local function given()
  local kind, class, per = int(), text(), int()
  local configured = { limit = int(), burst = int() }
  local limit, burst, override = int(), int(), int()
  local whole, fraction, turn = int(), int(), int()
  local cell = { kind = kind, per = per, limit = limit, burst = burst, held = 0, override = override, seen = now }
  if class == '' then
    cell.whole, cell.fraction, cell.at = whole, fraction, now
    return cell, configured
  end
  local period = bounds[class]
  if not period or now < period[1] or now >= period[2] then return nil end
  cell.class, cell.used, cell.turn, cell.start, cell.stop = class, whole, turn, period[1], period[2]
  return cell, configured
end

-- Takes up a reservation that its node still has, and the server no longer: it was lost with the cells. `is_news`: the
-- server has kept those and has never heard of it, so that what is spent of it has not been counted either.
local function take_up(pieces, is_news)
  for _, piece in ipairs(pieces) do
    local reserved, moved, names, turns = piece[1], piece[2], piece[3], piece[4]
    for i, name in ipairs(names) do
      local cell = cells[name]
      if cell and (not cell.class or cell.turn == turns[i]) then
        local held = max(reserved[cell.kind] - moved[cell.kind], 0)
        local spent = is_news and moved[cell.kind] or 0
        cell.held = cell.held + held
        if cell.class then cell.used = cell.used + spent else cell.whole = cell.whole - held - spent end
        dirty[name] = true
      end
    end
  end
end

-- Charges a reservation in full: its node is dead, or has forgotten it.
local function charge_in_full(pieces)
  for _, piece in ipairs(pieces) do settle_piece(piece, piece[1]) end
end

-- Of what nodes know of a cell that was lost, the least is left.
local function regain(cell, node)
  if cell.class then
    if cell.turn == node.turn then cell.used = max(cell.used, node.used) end
  else
    cell.whole = min(cell.whole, node.whole - cell.held)
  end
end

-- Sessions that are over, each with the last step applied: by the day on which all was charged, so that they are forgotten
-- by days, and nobody has to look through them.
local function over_key(days_ago)
  return meta_key .. ':over:' .. string.format('%.0f', floor(now / FORGET_MS) - days_ago)
end

local function bury(of)
  local applied = redis.call('HGET', meta_key, 'q:' .. of) or 0
  redis.call('HDEL', meta_key, 's:' .. of, 'q:' .. of, 'o:' .. of)
  redis.call('HSET', over_key(0), of, applied)
  redis.call('PEXPIRE', over_key(0), 2 * FORGET_MS)
end

-- The last step applied of this session, if it is over.
local function buried()
  return redis.call('HGET', over_key(0), session) or redis.call('HGET', over_key(1), session)
end

local function count_alive()
  local fields, alive = redis.call('HGETALL', meta_key), 0
  for i = 1, #fields, 2 do
    if fields[i]:sub(1, 2) == 's:' and tonumber(fields[i + 1]) > now then alive = alive + 1 end
  end
  redis.call('HSET', meta_key, 'alive', alive)
end

-- A node takes part. Cells that are missing are made as it has them; the limits of the others are those of the newest
-- config, by its stamp, or an administrator's. Returns how many cells were made, how many have other limits than the
-- node's, whether the session was still known, and for how many milliseconds others are still to be waited for, since the
-- server had lost what the nodes knew.
function run.join()
  local stamp, was_here, count = int(), int() == 1, int()
  local names, from_node, configured = {}, {}, {}
  for i = 1, count do
    local name = text()
    names[i] = name
    from_node[name], configured[name] = given()
    if not from_node[name] then return { BOUNDS, now } end
  end
  local known = redis.call('HMGET', meta_key, 's:' .. session, 'stamp', 'regains')
  local newest, regains = tonumber(known[2]) or 0, tonumber(known[3]) or 0
  local applied = not known[1] and buried()
  local is_kept = known[1] or applied
  load(names)
  if not advance(names) then return { BOUNDS, now } end
  if was_here and not is_kept and regains <= now then
    regains = now + REGAIN_MS
    redis.call('HSET', meta_key, 'regains', regains)
  end
  local made, differing = 0, 0
  for _, name in ipairs(names) do
    local cell, node, new = cells[name], from_node[name], configured[name]
    if cell and stamp > newest and cell.override == 0 and (cell.limit ~= new.limit or cell.burst ~= new.burst) then
      if not cell.class then cell.whole = cell.whole + new.burst - cell.burst end
      cell.limit, cell.burst, dirty[name] = new.limit, new.burst, true
      differing = differing + 1
    elseif not cell then
      cells[name], dirty[name], made = node, true, made + 1
    elseif cell.limit ~= node.limit or cell.burst ~= node.burst then
      differing = differing + 1
    elseif was_here and now < regains then
      regain(cell, node)
      dirty[name] = true
    end
  end
  redis.call('HSET', meta_key, 's:' .. session, now + SESSION_MS, 'stamp', max(stamp, newest))
  redis.call('HDEL', meta_key, 'o:' .. session)
  if applied then redis.call('HSET', meta_key, 'q:' .. session, applied) end
  count_alive()
  save()
  return { DONE, now, made, differing, is_kept and 1 or 0, max(regains - now, 0) }
end

-- What a node that takes part again still holds, and the server may not: as it was charged, or as it was lost. What the
-- node has told it to settle is over.
function run.hold()
  local is_news, found, all = int() == 1, {}, {}
  for i = 1, int() do
    local one = { id = text(), settled_by = int(), pieces = {} }
    for k = 1, int() do
      local piece = { amounts(), amounts(), {}, {} }
      for j = 1, int() do piece[3][j], piece[4][j] = text(), int() end
      one.pieces[k] = piece
    end
    found[i] = one
  end
  if not is_known() then return { UNKNOWN, now } end
  local last = tonumber(redis.call('HGET', meta_key, 'q:' .. session)) or 0
  local missing = {}
  for _, one in ipairs(found) do
    local is_over = one.settled_by > 0 and one.settled_by <= last
    if not is_over and redis.call('HEXISTS', own_key, one.id) == 0 then
      one.charged = redis.call('HGET', charged_key(session), one.id)
      if one.charged then one.pieces = cmsgpack.unpack(one.charged) end
      if #one.pieces > 0 then missing[#missing + 1], all[one.id] = one, one.pieces end
    end
  end
  local touched = names_of(all)
  load(touched)
  if not advance(touched) then return { BOUNDS, now } end
  for _, one in ipairs(missing) do
    if one.charged then hold_again(one.pieces) else take_up(one.pieces, is_news) end
    redis.call('HSET', own_key, one.id, cmsgpack.pack(one.pieces))
    redis.call('HDEL', charged_key(session), one.id)
  end
  if #missing > 0 then redis.call('HINCRBY', meta_key, 'in_flight', #missing) end
  save()
  return { DONE, now }
end

-- A node that takes part again holds nothing beside these. What else the server has of it has ended, and that was lost, as
-- by a server that is started again with what it had written last: it is charged in full. What it had leased goes back.
-- Returns how many are left to be charged.
function run.only()
  local is_held = {}
  for _ = 1, int() do is_held[text()] = true end
  if not is_known() then return { UNKNOWN, now } end
  local charged, orphans, count, left = charged_key(session), {}, 0, 0
  local charged_lease = lease_pieces(redis.call('HGET', charged, LEASE))
  -- There may be both, where a request out of the lease was told of late.
  orphans[LEASE] = lease_pieces(redis.call('HGET', own_key, LEASE))
  for _, piece in ipairs(charged_lease) do table.insert(orphans[LEASE], piece) end
  for _, id in ipairs(redis.call('HKEYS', own_key)) do
    if id ~= LEASE and not is_held[id] then
      if count < MOST_EXPIRED then
        orphans[id] = cmsgpack.unpack(redis.call('HGET', own_key, id))
        count = count + 1
      else
        left = left + 1
      end
    end
  end
  local names = names_of(orphans)
  load(names)
  if not advance(names) then return { BOUNDS, now } end
  hold_again(charged_lease)
  for id, pieces in pairs(orphans) do
    if id ~= LEASE then
      charge_in_full(pieces)
    else
      for _, piece in ipairs(pieces) do settle_piece(piece, { 0, 0, 0, 0 }) end
    end
    redis.call('HDEL', own_key, id)
  end
  redis.call('HDEL', charged, LEASE)
  if count > 0 then redis.call('HINCRBY', meta_key, 'in_flight', -count) end
  save()
  return { DONE, now, left }
end

-- Charges in full some of what a session held that is over, and keeps it apart, should its node come back. Returns whether
-- that was all, and how much it was. A scan begins where all may be gone already, and then finds nothing though there is more.
local function charge(over)
  local from, to = reserved_key(over), charged_key(over)
  local cursor, found = 0, {}
  repeat
    local part = redis.call('HSCAN', from, cursor, 'COUNT', MOST_EXPIRED)
    cursor, found = part[1], part[2]
  until #found > 0 or cursor == '0'
  local reservations, count = {}, 0
  for i = 1, #found, 2 do reservations[found[i]] = cmsgpack.unpack(found[i + 1]) end
  local names = names_of(reservations)
  load(names)
  if not advance(names) then return false, 0 end
  for i = 1, #found, 2 do
    local id = found[i]
    charge_in_full(reservations[id])
    for _, piece in ipairs(reservations[id]) do piece[5] = resets_of(piece[3]) end
    redis.call('HSET', to, id, cmsgpack.pack(reservations[id]))
    redis.call('HDEL', from, id)
    if id ~= LEASE then count = count + 1 end
  end
  if #found == 0 then return true, 0 end
  redis.call('PEXPIRE', to, FORGET_MS)
  if count > 0 then redis.call('HINCRBY', meta_key, 'in_flight', -count) end
  return redis.call('HLEN', from) == 0, #found / 2
end

-- A cell is in use. Else it stays as it is: to be looked at changes nothing.
local function note_use(name)
  cells[name].seen = now
  if dirty[name] then return end
  local cell = cmsgpack.unpack(redis.call('HGET', cells_key, name))
  cell.seen = now
  redis.call('HSET', cells_key, name, cmsgpack.pack(cell))
end

-- Notes that these cells are in use, now and then, and forgets those that have not been for long.
local function tidy(names)
  local longest = FORGET_MS
  for _, name in ipairs(names) do
    local cell = cells[name]
    longest = max(longest, kept_ms(cell))
    if now - (cell.seen or 0) > SEEN_MS then note_use(name) end
  end
  -- Others may have quotas of longer periods.
  for _, key in ipairs({ cells_key, meta_key, own_key }) do
    if redis.call('PTTL', key) < longest then redis.call('PEXPIRE', key, longest) end
  end
  if now - (tonumber(redis.call('HGET', meta_key, 'tidied')) or 0) < SEEN_MS then return end
  redis.call('HSET', meta_key, 'tidied', now)
  local all = redis.call('HKEYS', cells_key)
  load(all)
  for _, name in ipairs(all) do
    local cell = cells[name]
    if cell.held == 0 and now - (cell.seen or now) > kept_ms(cell) then
      redis.call('HDEL', cells_key, name)
      cells[name], dirty[name] = false, nil
    end
  end
end

-- A node is alive. Returns how many are, and how all cells stand.
function run.beat()
  local names = texts(int())
  load(names)
  if not is_known() or not all_known(names) then return { UNKNOWN, now } end
  if not advance(names) then return { BOUNDS, now } end
  local silence = now - (tonumber(redis.call('HGET', meta_key, 'beat')) or now)
  redis.call('HSET', meta_key, 'beat', now, 's:' .. session, now + SESSION_MS)
  local fields, over, alive = redis.call('HGETALL', meta_key), {}, 1
  for i = 1, #fields, 2 do
    local field, value = fields[i], tonumber(fields[i + 1])
    local what, other = field:sub(1, 2), field:sub(3)
    if what == 'o:' then
      over[#over + 1] = other
    elseif what == 's:' and other ~= session then
      -- Also where the clock was stepped back.
      local is_given_time = value > now + SESSION_MS or (value > 0 and silence > SILENCE_MS)
      if is_given_time then redis.call('HSET', meta_key, field, now + SESSION_MS) end
      if is_given_time or value > now then
        alive = alive + 1
      elseif value > 0 then
        -- From now on it is over, though it may take some time until all is charged.
        redis.call('HSET', meta_key, field, -now, 'o:' .. other, now)
        over[#over + 1] = other
      end
    end
  end
  local charged = 0
  for _, other in ipairs(over) do
    -- The rest has time until the next beat: others wait for the server.
    if charged >= MOST_EXPIRED then break end
    local is_all, count = charge(other)
    charged = charged + count
    if is_all then bury(other) end
  end
  redis.call('HSET', meta_key, 'alive', alive)
  tidy(names)
  save()
  local reply = { DONE, now, alive, tonumber(redis.call('HGET', meta_key, 'in_flight')) or 0 }
  for _, name in ipairs(names) do shown(reply, name) end
  return reply
end

-- A node goes: it has settled everything. If not, it is over like one that has died, and what it holds is charged.
function run.leave()
  if redis.call('HLEN', own_key) > 0 then return { DONE, now } end
  redis.call('HDEL', meta_key, 's:' .. session, 'q:' .. session)
  return { DONE, now }
end

return run[command]()
