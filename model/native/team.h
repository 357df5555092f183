// Threads that share loops out. OpenMP's would do, but for how they wait: looking on and on, or asleep. Where anything
// else wants a core for a moment, an event loop say, two of a team share the other one, and who waits there keeps it from
// who is waited for; and to be woken takes longer than most loops. These look on, but offer their core to others all the
// time, and sleep after a while. Beside others that never have enough an offered core is gone for milliseconds: once
// that shows they sleep at once instead, as who is woken goes first. What one has not begun of its share when the others
// are done, they do.

#pragma once

#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int LOOPS = 4;  // that one piece of work may have
typedef std::chrono::steady_clock Clock;

// Whether others keep the cores that they are offered, as found lately.
class Pressure {
   public:
    bool here(Clock::time_point time) const {
        return ticks(time.time_since_epoch()) < until_.load(std::memory_order_relaxed);
    }

    // Offers the core.
    void offer(Clock::time_point time) {
        sched_yield();
        const Clock::time_point back = Clock::now();
        if (back - time < KEPT) return;
        // Three times in a row, or nearly: an event loop may have much to do once.
        const long now = ticks(back.time_since_epoch());
        std::atomic<long>& third_last = times_[count_.fetch_add(1, std::memory_order_relaxed) % 3];
        if (now - third_last.exchange(now, std::memory_order_relaxed) < ticks(ROW))
            until_.store(now + ticks(REMEMBERED), std::memory_order_relaxed);
    }

   private:
    static constexpr std::chrono::milliseconds KEPT{1}, ROW{30}, REMEMBERED{500};
    static long ticks(Clock::duration span) { return span.count(); }

    std::atomic<long> until_{0}, times_[3] = {};
    std::atomic<unsigned long> count_{0};
};

// A number that threads wait to see changed.
class alignas(64) Bell {
   public:
    std::atomic<long> value{0};

    void wake() {
        if (asleep_.load() == 0) return;  // nor will anybody sleep without looking once more
        const std::lock_guard<std::mutex> lock(mutex_);
        woken_.notify_all();
    }

    template <class Done>
    void wait(Pressure& pressure, const Done& done) {
        const auto over = [&] { return done(value.load()); };
        Clock::time_point begin;
        for (int looks = 1; !over(); ++looks) {
            if (looks % LOOKS != 0) {
                pause();
                continue;
            }
            const Clock::time_point now = Clock::now();
            if (looks == LOOKS) begin = now;
            const bool pressed = pressure.here(now);
            if (now - begin > (pressed ? SHORT : LONG)) return sleep(over);
            if (!pressed) pressure.offer(now);
        }
    }

   private:
    static constexpr int LOOKS = 16;  // until the clock is looked at
    static constexpr std::chrono::microseconds LONG{2000}, SHORT{20};  // to look on

    std::atomic<long> asleep_{0};
    std::mutex mutex_;
    std::condition_variable woken_;

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }

    template <class Over>
    void sleep(const Over& over) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        woken_.wait(lock, over);
        asleep_.fetch_sub(1);
    }
};

struct alignas(64) Count {
    std::atomic<long> value{0};
};

// What the members of a team have in common while they work.
class Common {
   public:
    const int members;

    Common(int members, Pressure& pressure)
        : members(members), pressure_(pressure), taken_(new Count[LOOPS * members]) {}
    Count* taken(int loop) { return taken_.get() + loop * members; }

    // Until all have come.
    void meet() {
        const long round = round_.value.load();
        if (arrived_.value.fetch_add(1) + 1 < members)
            return round_.wait(pressure_, [round](long value) { return value != round; });
        arrived_.value.store(0);
        round_.value.store(round + 1);
        round_.wake();
    }

    // Before other work.
    void reset() {
        for (long i = 0; i < LOOPS * members; ++i) taken_[i].value.store(0, std::memory_order_relaxed);
    }

   private:
    Pressure& pressure_;
    std::unique_ptr<Count[]> taken_;
    Count arrived_;
    Bell round_;
};

// One thread of those at a piece of work.
class Member {
   public:
    Member() = default;  // of no team: it does all by itself
    Member(int number, Common& common) : number_(number), common_(&common) {}

    // use(i) for all i of [0, total), each by one member, so many at a time (0: a few times each). Every member comes
    // here, and goes on when there is nothing left to begin.
    template <class Use>
    void each(long total, long at_once, const Use& use) {
        if (common_ == nullptr) {
            for (long i = 0; i < total; ++i) use(i);
            return;
        }
        assert(loop_ < LOOPS);
        const int members = common_->members;
        Count* taken = common_->taken(loop_++);
        const long some = at_once > 0 ? at_once : std::max(1L, total / members / 4);
        for (int k = 0; k < members; ++k) {
            const int whose = (number_ + k) % members;
            const long begin = total * whose / members, end = total * (whose + 1) / members;
            for (;;) {
                const long at = begin + taken[whose].value.fetch_add(some, std::memory_order_relaxed);
                if (at >= end) break;
                for (long i = at; i < std::min(end, at + some); ++i) use(i);
            }
        }
    }

    // What all have done so far is there.
    void wait() {
        if (common_ != nullptr) common_->meet();
    }

   private:
    int number_ = 0, loop_ = 0;
    Common* common_ = nullptr;
};

class Team {
   public:
    // The process's. Its threads live as long as that; a forked process gets its own.
    static Team& here() { return *current(); }

    // work(member) by so many threads, the caller among them; by the caller alone while others have the team.
    template <class Work>
    void run(int threads, const Work& work) {
        if (threads <= 1 || busy_.exchange(true)) {
            Member alone;
            return work(alone);
        }
        gather(threads);
        work_ = &work;
        call_ = [](const void* work, Member& member) { (*static_cast<const Work*>(work))(member); };
        left_.value.store(threads - 1);
        for (int i = 0; i < threads - 1; ++i) {
            workers_[i]->value.fetch_add(1);
            workers_[i]->wake();
        }
        Member member(0, *common_);
        work(member);
        left_.wait(pressure_, [](long left) { return left == 0; });
        busy_.store(false);
    }

   private:
    std::atomic<bool> busy_{false};
    Pressure pressure_;
    std::vector<std::unique_ptr<Bell>> workers_;  // with the number of calls to each
    std::unique_ptr<Common> common_;
    const void* work_ = nullptr;
    void (*call_)(const void*, Member&) = nullptr;
    Bell left_;

    static Team*& current() {
        static Team* team = [] {
            pthread_atfork(nullptr, nullptr, [] { current() = new Team; });  // the old one's threads are not here
            return new Team;
        }();
        return team;
    }

    void gather(int threads) {
        if (common_ == nullptr || common_->members != threads) common_ = std::make_unique<Common>(threads, pressure_);
        else common_->reset();
        while (long(workers_.size()) < threads - 1) {
            workers_.push_back(std::make_unique<Bell>());
            std::thread(&Team::serve, this, long(workers_.size()), workers_.back().get()).detach();
        }
    }

    void serve(long number, Bell* calls) {
        for (long seen = 0;; ++seen) {
            calls->wait(pressure_, [seen](long value) { return value != seen; });
            Member member(number, *common_);
            call_(work_, member);
            if (left_.value.fetch_sub(1) == 1) left_.wake();
        }
    }
};

// work(member) by as many threads as torch uses, or by one where it is not worth more.
template <class Work>
inline void together(bool worth_it, const Work& work) {
    if (worth_it) return Team::here().run(omp_get_max_threads(), work);
    Member alone;
    work(alone);
}

// use(i) for all i of [0, total), likewise.
template <class Use>
inline void for_each(bool worth_it, long total, long at_once, const Use& use) {
    together(worth_it, [&](Member& member) { member.each(total, at_once, use); });
}

}  // namespace
